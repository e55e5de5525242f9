"""Writes form.h: the Arrow stream of the result, with zeros where screen.c puts its counts."""

from pathlib import Path

import pyarrow as pa

ROWS = 3
batch = pa.record_batch({"distance": pa.array(range(ROWS), pa.int64()), "customers": pa.array([0] * ROWS, pa.int64())})
sink = pa.BufferOutputStream()
with pa.ipc.new_stream(sink, batch.schema) as writer:
    writer.write_batch(batch)
form = bytes(sink.getvalue())
lines = [", ".join(map(str, form[at : at + 24])) for at in range(0, len(form), 24)]
joined = ",\n".join(lines)
Path(__file__).with_name("form.h").write_text(
    "// Written by make_form.py.\n#define ROWS 3\n"
    f"static unsigned char form[] __attribute__((aligned(8))) = {{\n{joined}}};\n"
)
