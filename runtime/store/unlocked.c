/* A store's inner loops: reads many records and hashes each while its bytes are in the core's cache,
 * without the GIL; and looks ids up by their hashes, with it, as that takes a microsecond or two.
 *
 * `unlocked.py` compares the hashes with those of the `xxhash` package before they are used. Where no
 * compiler built this file, Python does all of it instead.
 */
#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <unistd.h>

#include "xxh3.h"

enum { MANY = 32 }; /* ids at a time: while one's place in a table comes from memory, others' do */

/* Fills `size` bytes from `offset` on; returns whether all came. */
static int read_whole(int file, uint8_t *out, size_t size, int64_t offset) {
    size_t done = 0;
    while (done < size) {
        ssize_t got = pread(file, out + done, size - done, (off_t)(offset + (int64_t)done));
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return 0;
        done += (size_t)got;
    }
    return 1;
}

PyDoc_STRVAR(
    read_doc,
    "read_and_hash(table, count, size, hashed) -> int\n\n"
    "Reads `size` bytes of each of `count` places in files; returns how many came whole before the\n"
    "first that did not. `table` is the address of int64 [5, count]: file descriptors, offsets in\n"
    "the files, addresses to read to, seeds (uint64), and hashes (uint64), written where `hashed`.");

static PyObject *read_and_hash(PyObject *module, PyObject *args) {
    (void)module;
    Py_ssize_t count, size, at = 0;
    unsigned long long table;
    int hashed;
    if (!PyArg_ParseTuple(args, "Knnp", &table, &count, &size, &hashed))
        return NULL;
    if (count < 0 || size < LEAST_BYTES) {
        PyErr_Format(PyExc_ValueError, "%zd records of %zd bytes: expected over 240", count, size);
        return NULL;
    }
    const int64_t *files = (const int64_t *)(uintptr_t)table;
    const int64_t *offsets = files + count, *addresses = offsets + count;
    const uint64_t *seeds = (const uint64_t *)(addresses + count);
    uint64_t *sums = (uint64_t *)(uintptr_t)table + 4 * count;
    Py_BEGIN_ALLOW_THREADS
    for (; at < count; at++) {
        uint8_t *out = (uint8_t *)(uintptr_t)addresses[at];
        if (!read_whole((int)files[at], out, (size_t)size, offsets[at]))
            break;
        if (hashed)
            sums[at] = hash_of(out, (size_t)size, seeds[at]);
    }
    Py_END_ALLOW_THREADS
    return PyLong_FromSsize_t(at);
}

/* A table of live records, as `_Table` of ids.py keeps it. `keys`, ascending, are the low halves of
 * their ids' digests; `order` says which place each one's record has; in `buckets`, by a key's leading
 * bits, is the first of them. Numbers in `order` and `buckets` have `width` bytes. */
typedef struct {
    uint64_t buckets, keys, order, highs, live; /* addresses */
    uint64_t num_live, shift, width;
} record_table;

static uint64_t number(uint64_t address, uint64_t width, uint64_t at) {
    const void *from = (const void *)(uintptr_t)address;
    return width == 4 ? ((const uint32_t *)from)[at] : ((const uint64_t *)from)[at];
}

/* The place of the live record with this digest, whose key is not before `at`; -1 for none. */
static int64_t place_of(const record_table *table, digest wanted, uint64_t at) {
    const uint64_t *keys = (const uint64_t *)(uintptr_t)table->keys;
    const uint64_t *highs = (const uint64_t *)(uintptr_t)table->highs;
    const uint8_t *live = (const uint8_t *)(uintptr_t)table->live;
    for (; at < table->num_live && keys[at] <= wanted.low; at++) {
        if (keys[at] != wanted.low)
            continue;
        uint64_t place = number(table->order, table->width, at);
        if (highs[place] == wanted.high && live[place])
            return (int64_t)place;
    }
    return -1;
}

/* Writes the digests of some ids; returns a bit for each that no store can hold, or -1: no string.
 * Those are the empty one and what is no Unicode. */
static int64_t digests_of(PyObject *ids, Py_ssize_t first, int count, digest *digests) {
    int64_t none = 0;
    for (int each = 0; each < count; each++) {
        PyObject *id = PyList_GetItem(ids, first + each);
        Py_ssize_t size = 0;
        const char *text = id == NULL ? NULL : PyUnicode_AsUTF8AndSize(id, &size);
        if (text == NULL) {
            if (id == NULL || !PyUnicode_Check(id))
                return -1;
            PyErr_Clear();
        }
        if (size == 0)
            none |= (int64_t)1 << each;
        else
            digests[each] = digest_of((const uint8_t *)text, (size_t)size);
    }
    return none;
}

PyDoc_STRVAR(
    find_doc,
    "find_ids(ids, table) -> (places, num_found)\n\n"
    "Looks a list of strings up; places are the bytes of int64, -1 for what is not there. `table`:\n"
    "the bytes of uint64: addresses of buckets, keys, order, highs, live; how many live; by how much\n"
    "a key is shifted to its bucket; 4 or 8, the bytes of a number in order and buckets.");

static PyObject *find_ids(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *ids;
    const char *bytes;
    Py_ssize_t num_bytes, found = 0;
    record_table table;
    if (!PyArg_ParseTuple(args, "Oy#", &ids, &bytes, &num_bytes))
        return NULL;
    if (!PyList_Check(ids) || num_bytes != sizeof table)
        return PyErr_Format(PyExc_TypeError, "expected a list and a table of %zu bytes", sizeof table);
    memcpy(&table, bytes, sizeof table);
    const Py_ssize_t count = PyList_Size(ids);
    PyObject *out = PyBytes_FromStringAndSize(NULL, count * (Py_ssize_t)sizeof(int64_t));
    if (out == NULL)
        return NULL;
    int64_t *places = (int64_t *)PyBytes_AsString(out);
    const uint64_t *keys = (const uint64_t *)(uintptr_t)table.keys;
    for (Py_ssize_t first = 0; first < count; first += MANY) {
        digest digests[MANY];
        uint64_t begins[MANY];
        const int some = count - first < MANY ? (int)(count - first) : MANY;
        const int64_t none = digests_of(ids, first, some, digests);
        if (none < 0) {
            Py_DECREF(out);
            return NULL;
        }
        const int64_t skipped = table.num_live ? none : -1;
        for (int each = 0; each < some; each++)
            if (!(skipped >> each & 1)) {
                begins[each] = number(table.buckets, table.width, digests[each].low >> table.shift);
                __builtin_prefetch(&keys[begins[each]]);
            }
        for (int each = 0; each < some; each++) {
            int64_t place = -1;
            if (!(skipped >> each & 1))
                place = place_of(&table, digests[each], begins[each]);
            places[first + each] = place;
            found += place >= 0;
        }
    }
    return Py_BuildValue("Nn", out, found);
}

static PyMethodDef METHODS[] = {
    {"read_and_hash", read_and_hash, METH_VARARGS, read_doc},
    {"find_ids", find_ids, METH_VARARGS, find_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT, "_unlocked", "A store's inner loops.", 0, METHODS,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__unlocked(void) {
    choose_vectors();
    return PyModuleDef_Init(&MODULE);
}
