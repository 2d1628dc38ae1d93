"""One probe of one endpoint, for whoever wants to know whether it answers: the collectors, and the healer's proof.

A module of the configuration says how to ask and what a good answer is; a result says what came back, whatever the other
side did, within a deadline. Nothing here knows metrics, scrapes or PM2, or keeps anything from one probe to the next.
"""
