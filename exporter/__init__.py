"""pm2-exporter looks and never touches.

It turns what PM2, /proc, the disks, MongoDB and HTTP endpoints say into Prometheus metrics. Nothing in here changes what it
looks at: whatever acts belongs to the healer, which may use `exporter.pm2` and `exporter.probe`.
"""

VERSION = "0.1.0"
