#!/usr/bin/env bash
# A PM2 app that crashes again and again.
sleep "${EVERY_SECONDS:-0.3}"
exit 1
