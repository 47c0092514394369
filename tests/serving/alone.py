"""`slingshot serve` in a network of its own, where whatever it sends is seen: unshare -rn python -m tests.serving.alone

Argument, as JSON: {"checkpoint": its folder, "serve": [arguments], "asked": [[method, path, body], ...],
"upstreams": how many there are}. Where nothing is asked the server is waited for: it cannot start.
Prints {"statuses": [...], "connected": {kind: [[address, port], ...]}}: kinds are "server", "upstream" and "elsewhere".
Every address leads to loopback there, so that a connection to anywhere is a packet on it.
"""

import contextlib
import ctypes
import fcntl
import json
import socket
import struct
import subprocess
import sys
import threading

import httpx

from slingshot.checkpoint.load_save import load_tokenizer
from tests.serving.conftest import ScriptedBackend, running
from tests.serving.fake_servers import fake_server

_UP, _ADDRESS, _ROUTE, _ALL = 0x8914, 0x8916, 0x890B, 3  # SIOCSIFFLAGS, SIOCSIFADDR, SIOCADDRT, ETH_P_ALL


def lead_all_to_loopback():
    def address(text):
        return struct.pack("HH4s8x", socket.AF_INET, 0, socket.inet_aton(text))

    nowhere, device = address("0.0.0.0"), ctypes.create_string_buffer(b"lo")
    route = struct.pack(
        "L16s16s16sHhLLHhPLLH6x", 0, nowhere, nowhere, nowhere, 1, *[0] * 5, ctypes.addressof(device), 0, 0, 0
    )
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _UP, struct.pack("16sH22x", b"lo", 0x41))
        fcntl.ioctl(any_socket, _ADDRESS, struct.pack("16s16s8x", b"lo:0", address("192.0.2.1")))
        fcntl.ioctl(any_socket, _ROUTE, route)


def watch(seen):
    """Add (address, port) of whatever is sent: a connection's first packet, or any that needs none."""
    wire = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ALL))

    def read():
        while True:
            packet = wire.recv(65536)
            old = packet[0] >> 4 == 4
            start, kind, to = (
                ((packet[0] & 15) * 4, packet[9], packet[16:20]) if old else (40, packet[6], packet[24:40])
            )
            if kind != socket.IPPROTO_TCP or packet[start + 13] & 0x12 == 2:  # SYN without ACK
                port = struct.unpack_from("!H", packet, start + 2)[0]
                seen.add((socket.inet_ntop(socket.AF_INET if old else socket.AF_INET6, to), port))

    threading.Thread(target=read, daemon=True).start()


def main(serve, asked, checkpoint, upstreams=0):
    lead_all_to_loopback()
    seen, statuses, ours = set(), [], {}
    watch(seen)
    with contextlib.ExitStack() as stack:
        tokenizer = load_tokenizer(checkpoint)
        for _ in range(upstreams):
            backend = ScriptedBackend(
                [*tokenizer.encode("7", continues=True), tokenizer.eos_id], eos_ids=tokenizer.eos_ids
            )
            url = stack.enter_context(running(fake_server(backend, tokenizer, "vllm")))
            ours["127.0.0.1", int(url.rpartition(":")[2])] = "upstream"
            serve = [*serve, "--upstream", url]
        command = [sys.executable, "-m", "slingshot", "serve", checkpoint, "--port", "0", *serve]
        process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        stack.callback(process.kill)
        url = next(line.split()[1] for line in process.stdout if line.startswith("API"))
        ours["127.0.0.1", int(url.removesuffix("/v1").rpartition(":")[2])] = "server"
        with httpx.Client(base_url=url.removesuffix("/v1"), timeout=60, trust_env=False) as http:
            statuses = [http.request(method, path, json=body).status_code for method, path, body in asked]
        if not asked:
            process.wait(120)
    connected = {"server": [], "upstream": [], "elsewhere": []}
    for address in sorted(seen):
        connected[ours.get(address, "elsewhere")].append(address)
    print(json.dumps({"statuses": statuses, "connected": connected}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
