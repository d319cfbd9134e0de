import subprocess
import sys
from pathlib import Path

from ddsm_engine.bundle import Bundle

TWO_THREADS = """
import sys, threading
import ddsm_engine.backends.openvino as backend
model = backend.core().read_model(sys.argv[1])
constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"][:2]
sys.setswitchinterval(1e-6)
barrier = threading.Barrier(2)

def read(node):
    barrier.wait()
    node.get_data()

threads = [threading.Thread(target=read, args=(node,)) for node in constants]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_two_threads_may_be_the_first_to_hand_over_an_array(bundle: Bundle) -> None:
    """The bindings alone stand still here in eleven of twelve processes, the interpreter with them."""
    model = Path(bundle.artefact(bundle.full))
    for _ in range(3):
        subprocess.run([sys.executable, "-c", TWO_THREADS, str(model)], check=True, timeout=60)
