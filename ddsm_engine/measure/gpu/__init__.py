"""``ddsm bench --suite gpu``: what a GPU makes of the engines, one small module per question."""
