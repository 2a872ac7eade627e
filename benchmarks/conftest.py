"""Set before torch makes its first tensor: huge pages and kept memory, for every provider alike."""

from ppnet.roofline.machine import steady_memory

steady_memory()
