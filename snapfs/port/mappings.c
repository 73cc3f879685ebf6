/* Files mapped into memory whose failures are told, instead of ending the process.
 *
 * What touches a mapped page that cannot be had gets SIGBUS: one that cannot be read from the
 * disk again, or made writable again when a copy-on-write file system is full, or any that is
 * dirtied after its file system has shut down (mmap(2), ERRORS).  Here such a page is replaced by
 * one in memory alone, with the same content if that can be read and zeros if not, and the program
 * goes on.  From then on what is in that mapping is neither right nor stored.  So whoever has read bits
 * looks at `failures()` before acting on them, as does whoever has set some that others rely on:
 * the count is raised before the page is there.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

/* Pages that have been replaced and whose mappings are still there.  With more the daemon would not
 * live: a file system that is gone costs each mapping the pages that are written, a few. */
enum { MOST_REPLACED = 65536 };

/* Bytes of mappings that may be kept in memory, and the share of the machine's that is: a thousand
 * snapshots of 1 TiB have 4 GB of bitmaps, which nobody else could have otherwise. */
enum { MOST_KEPT = 256 << 20, SHARE_KEPT = 16 };

typedef struct mapping {
    PyObject_HEAD
    char *address; /* NULL: closed */
    size_t length; /* whole pages are mapped */
    Py_ssize_t exports;
    uint32_t failed; /* pages replaced; set in the handler */
    bool kept;       /* in memory, once touched */
    struct mapping *next, *previous;
} Mapping;

/* Guards the list, and the pages that have been replaced.  Held for moments only, by threads that touch no
 * mapped page meanwhile; the handler takes it as well. */
static bool locked;
static Mapping *mappings;
static uintptr_t replaced[MOST_REPLACED];
static size_t replaced_count;
static uint64_t failures; /* in this process; shared with C that judges requests, see `counter` */
static size_t page_size;
static size_t kept; /* bytes of mappings that are; with the GIL */
static struct sigaction previous_action;

static void lock(void)
{
    while (__atomic_test_and_set(&locked, __ATOMIC_ACQUIRE))
        sched_yield();
}

static void unlock(void)
{
    __atomic_clear(&locked, __ATOMIC_RELEASE);
}

/* ---- the handler: only what may be called in one (signal-safety(7)), and system calls ------- */

static Mapping *mapping_at(uintptr_t page)
{
    Mapping *mapping = mappings;

    while (mapping && (page < (uintptr_t)mapping->address ||
                       page - (uintptr_t)mapping->address >= mapping->length))
        mapping = mapping->next;
    return mapping;
}

static bool is_replaced(uintptr_t page)
{
    for (size_t i = 0; i < replaced_count; i++)
        if (replaced[i] == page)
            return true;
    return false;
}

/* With the lock. */
static bool replace(Mapping *mapping, uintptr_t page)
{
    struct iovec there = {(void *)page, page_size}, here = {NULL, page_size};
    void *fresh;

    if (replaced_count == MOST_REPLACED)
        return false;
    fresh = mmap(NULL, page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (fresh == MAP_FAILED)
        return false;
    here.iov_base = fresh;
    (void)process_vm_readv(getpid(), &here, 1, &there, 1, 0); /* what cannot be read stays zero */
    __atomic_add_fetch(&mapping->failed, 1, __ATOMIC_SEQ_CST);
    __atomic_add_fetch(&failures, 1, __ATOMIC_SEQ_CST); /* before anybody can see the page */
    if (mremap(fresh, page_size, page_size, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)page) ==
        MAP_FAILED) {
        munmap(fresh, page_size);
        return false;
    }
    replaced[replaced_count++] = page;
    return true;
}

static void on_sigbus(int number, siginfo_t *info, void *context)
{
    const int saved = errno;
    const uintptr_t page = (uintptr_t)info->si_addr & ~(uintptr_t)(page_size - 1);
    Mapping *mapping;
    bool good;

    (void)number, (void)context;
    lock();
    mapping = mapping_at(page);
    good = mapping && (is_replaced(page) /* by another thread, just now */ ||
                       replace(mapping, page));
    unlock();
    if (!good) /* not ours: it comes again, to whoever was there before */
        sigaction(SIGBUS, &previous_action, NULL);
    errno = saved;
}

static bool install(void)
{
    struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    struct sigaction now;

    sigemptyset(&action.sa_mask);
    if (sigaction(SIGBUS, NULL, &now))
        return false;
    if (now.sa_flags & SA_SIGINFO && now.sa_sigaction == on_sigbus)
        return true;
    previous_action = now; /* before ours can run */
    return sigaction(SIGBUS, &action, NULL) == 0;
}

/* ---- the type ------------------------------------------------------------------------------ */

static size_t most_kept(void)
{
    const long pages = sysconf(_SC_PHYS_PAGES);
    const size_t share = pages < 0 ? MOST_KEPT : (size_t)pages / SHARE_KEPT * page_size;

    return share < MOST_KEPT ? share : MOST_KEPT;
}

/* A page that could not be written back stays as it is until memory is short: not before we have
 * asked, if its mapping is kept.  Beyond what may be, the oldest has to do without: a snapshot that
 * gets no copies any more, in most cases.  So does what an ordinary user may not lock.  With the GIL,
 * and the new one in the list. */
static void keep(Mapping *self)
{
    const size_t most = most_kept();
    Mapping *oldest = self;

    if (self->length > most || mlock2(self->address, self->length, MLOCK_ONFAULT))
        return;
    self->kept = true;
    kept += self->length;
    while (oldest->next)
        oldest = oldest->next;
    for (; kept > most && oldest != self; oldest = oldest->previous)
        if (oldest->kept) {
            (void)munlock(oldest->address, oldest->length);
            oldest->kept = false;
            kept -= oldest->length;
        }
}

static void forget(Mapping *self)
{
    size_t left = 0;

    if (self->kept)
        kept -= self->length;

    lock();
    if (self->previous)
        self->previous->next = self->next;
    else
        mappings = self->next;
    if (self->next)
        self->next->previous = self->previous;
    for (size_t i = 0; i < replaced_count; i++)
        if (replaced[i] - (uintptr_t)self->address >= self->length)
            replaced[left++] = replaced[i];
    replaced_count = left;
    unlock();
    munmap(self->address, self->length);
    self->address = NULL;
}

static PyObject *mapping_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"fd", "size", NULL};
    Mapping *self;
    Py_ssize_t size;
    void *address;
    int fd;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "in:Mapping", names, &fd, &size))
        return NULL;
    if (size <= 0) {
        PyErr_SetString(PyExc_ValueError, "a mapping has at least one byte");
        return NULL;
    }
    if (!install())
        return PyErr_SetFromErrno(PyExc_OSError);
    self = (Mapping *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    address = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (address == MAP_FAILED) {
        Py_DECREF(self);
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    self->address = address;
    self->length = (size_t)size;
    lock();
    self->next = mappings;
    if (mappings)
        mappings->previous = self;
    mappings = self;
    unlock();
    keep(self);
    return (PyObject *)self;
}

static void mapping_dealloc(Mapping *self)
{
    PyTypeObject *type = Py_TYPE(self);

    if (self->address)
        forget(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *mapping_close(Mapping *self, PyObject *Py_UNUSED(unused))
{
    if (self->exports) {
        PyErr_SetString(PyExc_BufferError, "cannot close a mapping that is in use");
        return NULL;
    }
    if (self->address)
        forget(self);
    Py_RETURN_NONE;
}

static int mapping_getbuffer(Mapping *self, Py_buffer *view, int flags)
{
    if (!self->address) {
        PyErr_SetString(PyExc_BufferError, "the mapping is closed");
        view->obj = NULL;
        return -1;
    }
    if (PyBuffer_FillInfo(view, (PyObject *)self, self->address, (Py_ssize_t)self->length, false,
                          flags))
        return -1;
    self->exports++;
    return 0;
}

static void mapping_releasebuffer(Mapping *self, Py_buffer *view)
{
    (void)view;
    self->exports--;
}

static Py_ssize_t mapping_length(Mapping *self)
{
    return self->address ? (Py_ssize_t)self->length : 0;
}

static PyObject *mapping_subscript(Mapping *self, PyObject *key)
{
    PyObject *view = PyMemoryView_FromObject((PyObject *)self), *found, *bytes;

    if (!view)
        return NULL;
    found = PyObject_GetItem(view, key);
    Py_DECREF(view);
    if (!found || PyLong_Check(found))
        return found;
    bytes = PyBytes_FromObject(found);
    Py_DECREF(found);
    return bytes;
}

static int mapping_assign(Mapping *self, PyObject *key, PyObject *value)
{
    PyObject *view = PyMemoryView_FromObject((PyObject *)self);
    int result;

    if (!view)
        return -1;
    result = value ? PyObject_SetItem(view, key, value) : PyObject_DelItem(view, key);
    Py_DECREF(view);
    return result;
}

static PyObject *mapping_failed(Mapping *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(__atomic_load_n(&self->failed, __ATOMIC_SEQ_CST) != 0);
}

static PyMethodDef mapping_methods[] = {
    {"close", (PyCFunction)mapping_close, METH_NOARGS,
     "Unmap; BufferError while somebody holds a buffer of it."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef mapping_attributes[] = {
    {"failed", (getter)mapping_failed, NULL, "Has a page been replaced?  Then nothing in it counts.",
     NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

/* Slots hold functions as void pointers: POSIX has them convertible. */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpedantic"
static PyType_Slot mapping_slots[] = {
    {Py_tp_doc, "Mapping(fd, size): a file's first bytes, shared, to read and write.\n\n"
                "The descriptor is not needed any more.  A writable buffer; slices are bytes."},
    {Py_tp_new, mapping_new},
    {Py_tp_dealloc, mapping_dealloc},
    {Py_tp_methods, mapping_methods},
    {Py_tp_getset, mapping_attributes},
    {Py_bf_getbuffer, mapping_getbuffer},
    {Py_bf_releasebuffer, mapping_releasebuffer},
    {Py_mp_length, mapping_length},
    {Py_mp_subscript, mapping_subscript},
    {Py_mp_ass_subscript, mapping_assign},
    {0, NULL},
};
#pragma GCC diagnostic pop

static PyType_Spec mapping_spec = {
    .name = "snapfs.port._mappings.Mapping",
    .basicsize = sizeof(Mapping),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = mapping_slots,
};

/* ---- the module ---------------------------------------------------------------------------- */

static PyObject *module_failures(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return PyLong_FromUnsignedLongLong(__atomic_load_n(&failures, __ATOMIC_SEQ_CST));
}

static PyMethodDef functions[] = {
    {"failures", module_failures, METH_NOARGS,
     "How many pages of all mappings have been replaced since the process began."},
    {NULL, NULL, 0, NULL},
};

static int execute(PyObject *module)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &mapping_spec, NULL);
    PyObject *counter;

    page_size = (size_t)sysconf(_SC_PAGESIZE);
    if (!type || PyModule_AddObjectRef(module, "Mapping", type)) {
        Py_XDECREF(type);
        return -1;
    }
    Py_DECREF(type);
    counter = PyMemoryView_FromMemory((char *)&failures, sizeof(failures), PyBUF_READ);
    if (!counter || PyModule_AddObjectRef(module, "counter", counter)) {
        Py_XDECREF(counter);
        return -1;
    }
    Py_DECREF(counter);
    return 0;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, execute},
    {0, NULL},
};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "snapfs.port._mappings",
    .m_methods = functions,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__mappings(void);

PyMODINIT_FUNC PyInit__mappings(void)
{
    return PyModuleDef_Init(&definition);
}
