"""`afd live`: watch, steer and compare streams in the browser (docs/LIVE.md)."""
