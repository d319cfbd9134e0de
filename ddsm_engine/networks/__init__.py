"""Torch networks; imported only by the torch backend and by ddsm_export."""
