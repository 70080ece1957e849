"""What reports are drawn with: pictures with boxes, charts as SVG, the frame of a page."""
