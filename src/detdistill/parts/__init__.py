"""What detectors are built from: backbones, pyramid, towers, anchors, assigners, coders, losses."""
