"""What is done with bundles and checkpoints besides building: inspect, summarize, package.
Reads headers and manifests only.
"""
