"""Kernels of the engine, one file each: reference, implementation, public function. None is needed on a CPU yet."""
