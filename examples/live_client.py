"""Steer `afd live` from a program: switch the prompt at chunk 4 and keep the frames of 10 chunks.

python examples/live_client.py ws://127.0.0.1:8742/socket frames/   # needs: pip install websockets
"""

import json
import sys
from pathlib import Path

from websockets.sync.client import connect

url, folder = sys.argv[1], Path(sys.argv[2])
folder.mkdir(parents=True, exist_ok=True)
chunks = 0
with connect(url, subprotocols=["afd-live.1"], max_size=None) as socket:
    socket.send(json.dumps({"type": "restart", "seed": 7, "start": "noise"}))
    while chunks < 10:
        message = socket.recv()
        if isinstance(message, str):  # hello, state, switched, recorded, voted, problem
            print(message)
            continue
        size = 4 + int.from_bytes(message[:4], "big")
        header = json.loads(message[4:size])
        socket.send(json.dumps({"type": "seen", "take": header["take"], "chunk": header["chunk"]}))
        for student, sizes in enumerate(header["sizes"]):
            for frame, length in enumerate(sizes, header["start"]):
                name = f"take{header['take']}-{frame:05d}-{student}.jpg"
                (folder / name).write_bytes(message[size : size + length])
                size += length
        chunks += 1
        if chunks == 4:
            socket.send(json.dumps({"type": "switch", "prompt": "A blue ball", "mode": "recache"}))
