"""Environments in which torch's libraries use fewer instructions than this processor has (of Intel and AMD).

torch's own kernels, MKL's products and oneDNN's convolutions each have a variable; one that a library does not know, or
a processor does not have, changes nothing.
"""

from goldens import WITHOUT_ONEDNN

SETTINGS = {
    "as it is": {},
    "AVX-512 without AMX": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "SSE4.2": {"ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ATEN_CPU_CAPABILITY": "default"},
    "without oneDNN": {WITHOUT_ONEDNN: "1"},
}
