"""All that is known about PM2: its wire format, its process list, its events, and the one door to its daemon.

Could be a library of its own: it imports nothing from its neighbours. Reading and acting are separate types, so that who
may only look cannot act.
"""
