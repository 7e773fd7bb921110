"""llama.cpp's HTTP server on loopback, as the wheel xllamacpp carries it; run by the interpreter that has the wheel.

python llama_cpp_server.py PORT BASE.gguf LORA.gguf ...
"""

import signal
import sys

import xllamacpp


def main() -> None:
    port, base, *loras = sys.argv[1:]
    params = xllamacpp.CommonParams()
    params.model.path = base
    params.hostnames, params.port = ["127.0.0.1"], int(port)
    params.n_ctx, params.n_parallel = 512, 1
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in loras]
    params.lora_init_without_apply = True  # a request says which it wants
    # float32 all through, so that what differs from transformers is the order of sums alone
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    signal.pause()  # until a signal ends the process


if __name__ == "__main__":
    main()
