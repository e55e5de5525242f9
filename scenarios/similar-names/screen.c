// How many customers have a name on the list, or one that differs from it by one or two letters.
//
// Build: clang --target=wasm32 -O2 -nostdlib -s -Wl,--no-entry -o screen.wasm screen.c
// (the module beside this file: python -m ziglang cc --target=wasm32-freestanding -O2 -nostdlib -s -Wl,--no-entry
// -o screen.wasm screen.c, with ziglang 0.17.1)
//
// The contract's tables are customers (0) and listed (1), each with one column of text.

#include "form.h"

typedef unsigned char u8;
typedef unsigned int u32;
typedef long long i64;

#define LETTERS_MAX 64

typedef struct {
    int rows;
    const int *offsets;
    const u8 *letters;
} Names;

extern u8 __heap_base;
static u32 free_place, places[2];

static u32 u32_at(const u8 *p) { return p[0] | p[1] << 8 | p[2] << 16 | (u32)p[3] << 24; }

// A field of a flatbuffers table, or 0. Arrow's messages are such tables: format/Message.fbs.
static const u8 *field(const u8 *table, int index) {
    const u8 *vtable = table - (int)u32_at(table);
    int at = 4 + 2 * index;
    if (at >= (vtable[0] | vtable[1] << 8)) return 0;
    int offset = vtable[at] | vtable[at + 1] << 8;
    return offset ? table + offset : 0;
}

static const u8 *follow(const u8 *p) { return p + u32_at(p); }

// The one column of the one batch of an Arrow stream.
static Names names(int table) {
    const u8 *p = (const u8 *)places[table];
    for (;;) {  // messages: FFFFFFFF, length, metadata, body
        u32 length = u32_at(p + 4);
        const u8 *message = follow(p + 8), *body = p + 8 + length;
        if (*field(message, 1) == 3) {  // a record batch
            const u8 *batch = follow(field(message, 2)), *nodes = follow(field(batch, 1)) + 4;
            const u8 *buffers = follow(field(batch, 2)) + 4;  // validity, offsets, letters: place and length, 8 bytes each
            Names found = {u32_at(nodes), (const int *)(body + u32_at(buffers + 16)), body + u32_at(buffers + 32)};
            return found;
        }
        const u8 *size = field(message, 3);
        p = body + (size ? u32_at(size) : 0);
    }
}

static u8 folded(u8 letter) { return letter >= 'A' && letter <= 'Z' ? letter + 32 : letter; }

static int least(int a, int b) { return a < b ? a : b; }

// Levenshtein's distance, or ROWS if it is that or more.
static int distance(const u8 *a, int n, const u8 *b, int m) {
    if (n > LETTERS_MAX || m > LETTERS_MAX || n - m >= ROWS || m - n >= ROWS) return ROWS;
    u8 row[LETTERS_MAX + 1];
    for (int j = 0; j <= m; j++) row[j] = j;
    for (int i = 1; i <= n; i++) {
        int diagonal = row[0], best = row[0] = i;
        for (int j = 1; j <= m; j++) {
            int changed = diagonal + (folded(a[i - 1]) != folded(b[j - 1]));
            diagonal = row[j];
            row[j] = least(changed, least(row[j], row[j - 1]) + 1);
            best = least(best, row[j]);
        }
        if (best >= ROWS) return ROWS;
    }
    return least(row[m], ROWS);
}

// Where the enclave shall write a table of so many bytes.
__attribute__((export_name("table"))) u32 table(u32 index, u32 bytes) {
    if (!free_place) free_place = (u32)&__heap_base;
    u32 place = (free_place + 63) & ~63u, end = place + bytes, have = __builtin_wasm_memory_size(0) << 16;
    if (end > have && __builtin_wasm_memory_grow(0, (end - have + 65535) >> 16) == (u32)-1) __builtin_trap();
    free_place = end;
    places[index] = place;
    return place;
}

__attribute__((export_name("run"))) void run(void) {
    Names customers = names(0), listed = names(1);
    i64 *counts = (i64 *)(form + sizeof form - 8 - 8 * ROWS);  // the last column, before the end of the stream
    for (int i = 0; i < customers.rows; i++) {
        const u8 *name = customers.letters + customers.offsets[i];
        int length = customers.offsets[i + 1] - customers.offsets[i], nearest = ROWS;
        for (int j = 0; j < listed.rows && nearest; j++) {
            int other = listed.offsets[j];
            nearest = least(nearest, distance(name, length, listed.letters + other, listed.offsets[j + 1] - other));
        }
        if (length && nearest < ROWS) counts[nearest]++;
    }
}

// Where a recipient's result lies: place in the upper half, bytes in the lower. The same for all.
__attribute__((export_name("result"))) i64 result(u32 recipient) {
    (void)recipient;
    return (i64)(u32)form << 32 | sizeof form;
}
