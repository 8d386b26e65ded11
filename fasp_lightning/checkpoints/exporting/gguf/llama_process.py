"""A process of its own that loads a GGUF file with llama.cpp: a file that it does not bear may abort the process.

It is started by its path and imports nothing of this package, so that it begins at once. It reads a job as JSON from
its input (see :func:`fasp_lightning.checkpoints.exporting.gguf.llama_cpp.ask`), and writes the answers as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener


def _server(job: dict[str, Any]) -> Any:
    """The file behind llama.cpp's server, on the CPU, silent but for errors."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = job["file"]
    params.n_ctx, params.n_parallel, params.n_gpu_layers = job["context"], 1, 0
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type[f"GGML_TYPE_{job['cache']}"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job["threads"]
    params.warmup, params.fit_params, params.ui, params.verbosity = job["warmup"], False, False, 1
    params.cache_ram_mib = 0
    if job["cache"] == "F32":  # flash attention rounds queries to fp16
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


def main() -> None:
    """Answer the job's requests, in turn."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what llama.cpp prints is no answer
    job = json.load(sys.stdin)
    server, direct = _server(job), build_opener(ProxyHandler({}))
    found = []
    for path, body in job["requests"]:
        request = Request(
            server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with direct.open(request) as response:
            found.append(json.load(response))
    json.dump(found, answers)
    answers.flush()
    os._exit(0)  # the server's threads need no farewell


if __name__ == "__main__":
    main()
