"""Serves artifacts: Open Inference Protocol over HTTP and gRPC, dynamic batching, versions, metrics.

One way through it::

    HTTP, gRPC ─decode→ Request ─Models.infer (which version?)→ Batcher (with whom?) ─Session.run→ Response ─encode→

Nothing here is imported by the rest of the toolchain; ``toolchain serve`` (``cli_serve.py``) is the way in.
"""
