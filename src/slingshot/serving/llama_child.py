"""llama.cpp's server in a process of its own: MODEL.gguf PORT SLOTS CONTEXT THREADS.

CONTEXT is of a slot, in tokens; 0 is the model's own. It prints its URL once it answers, and ends when its standard
input does: with its parent, however that ends. Nothing of slingshot is needed, only xllamacpp.
"""

import os
import sys

import xllamacpp


def main() -> None:
    model, port, slots, context, threads = sys.argv[1], *map(int, sys.argv[2:])
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.n_parallel = slots
    params.n_ctx = context * slots
    params.cache_ram_mib = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.verbosity = 1  # errors
    params.ui = False
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:  # the lines before it say why
        sys.exit(str(error))
    told, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # of which nobody reads more than the URL: a pipe would fill up, and so would a file
        os.dup2(nowhere, stream)
    os.write(told, f"{server.listening_address}\n".encode())
    os.close(told)
    sys.stdin.buffer.read()
    os._exit(0)  # what it runs is nobody's any more


if __name__ == "__main__":
    main()
