"""Set before torch is loaded: waiting OpenMP threads sleep, so that tests on a shared machine do not spin."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
