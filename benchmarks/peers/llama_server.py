"""llama.cpp's HTTP server: MODEL.gguf PORT SLOTS CONTEXT (tokens of a slot) THREADS. Runs until it is killed."""

import signal
import sys

import xllamacpp

model, port, slots, context, threads = sys.argv[1], *map(int, sys.argv[2:])
params = xllamacpp.CommonParams()
params.model.path = model
params.hostnames = ["127.0.0.1"]
params.port = port
params.n_parallel = slots
params.n_ctx = context * slots
params.cache_ram_mib = 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
server = xllamacpp.Server(params)
signal.pause()
