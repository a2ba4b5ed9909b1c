/* Messages between ranks over one TCP connection for each pair, moved by one thread that holds no interpreter lock.
 *
 * A connection carries messages in the order in which they are posted, at both ends the same, so the n-th message sent
 * is the n-th received. A message is its length and its bytes; a length that is not expected is an error. What is
 * received goes straight into the buffer that waits for it, and what is sent leaves straight from its own.
 *
 * A receiver sleeps until SO_RCVLOWAT bytes have come, the rest of the message or LOW_WATER of it: on a link of
 * 100 Mbit/s it would be woken for every packet otherwise, and waking costs more than the packet.
 *
 * A sum over ranks is two messages for each pair and direction: the terms of the receiver's piece, and the total of
 * the sender's, which waits in its queue until the thread has added it. Both are posted together, so the order stays
 * the same at both ends, and nobody has to wait in between.
 *
 * Buffers belong to Python, which keeps them until their messages are through or the mesh is closed.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define LOW_WATER (16 * 1024) /* a quarter of the least window: at the window itself senders were stopped again and again */
#define LOOK_MS 1000      /* so often what has come is looked at although it is less than was waited for */
#define MOST_AT_ONCE (1 << 20) /* bytes of one connection before the others have their turn */
#define SLICE_S 0.5       /* of a wait, after which Python hears of signals */
#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0
#endif

enum { SENDING, RECEIVING };
enum { DONE, LATE, BROKEN };
enum { CLOSED = -1, OTHER_LENGTH = -2 }; /* beside errno, what can break a connection */

/* The piece of a sum over ranks that this rank adds. */
typedef struct Sum {
    int kind, count; /* of what, and how many terms */
    int messages;    /* that still point here */
    int missing;     /* terms that have not come */
    int added;
    size_t numel;
    uint8_t *total; /* where this rank's term lies, and then the sum */
    struct Sum *next;
    const uint8_t *terms[]; /* in rank order */
} Sum;

typedef struct Message {
    uint8_t *data;
    uint64_t length, header; /* header: what is sent first, or has come first */
    size_t moved;            /* bytes, the header's among them */
    Sum *sum;                /* of which it is a term that comes, or the total that goes */
    struct Message *next;
} Message;

typedef struct {
    Message *first, *last;
    uint64_t posted, finished; /* how many messages */
} Queue;

typedef struct {
    int fd, broken, low_water;
    uint64_t told; /* the length that came where another was expected */
    Queue queues[2];
} Peer;

typedef struct Waiter {
    Py_ssize_t count;
    uint64_t (*marks)[3]; /* peer, direction, how many messages */
    pthread_cond_t woken;
    struct Waiter *next;
} Waiter;

typedef struct {
    int size, stop, wakes[2];
    pid_t process; /* a fork has no thread to end, and its parent's connections are not its own */
    Peer *peers;
    Sum *sums; /* that are not added yet */
    Waiter *waiters;
    pthread_mutex_t lock;
    pthread_t thread;
} Mesh;

/* ------------------------------------------------------------------------------------------------- one connection */

/* What is left of a message, in at most two pieces. */
static int pieces(Message *m, struct iovec *at) {
    int count = 0;
    size_t begun = m->moved < sizeof m->header ? 0 : m->moved - sizeof m->header;
    if (m->moved < sizeof m->header)
        at[count++] = (struct iovec){(uint8_t *)&m->header + m->moved, sizeof m->header - m->moved};
    if (begun < m->length) at[count++] = (struct iovec){m->data + begun, m->length - begun};
    return count;
}

static size_t whole(const Message *m) { return sizeof m->header + m->length; }

static void drop(Queue *q) {
    Message *m = q->first;
    q->first = m->next;
    if (!q->first) q->last = NULL;
    if (m->sum && --m->sum->messages == 0) free(m->sum);
    free(m);
}

/* Whether a queue waits for a total that is not added yet. */
static int is_held(const Queue *q) { return q->first && q->first->sum && !q->first->sum->added; }

/* Have the kernel wake us when the rest of the message is there, or LOW_WATER of it. */
static void set_low_water(Peer *p) {
    Message *m = p->queues[RECEIVING].first;
    size_t left = m ? whole(m) - m->moved : 1;
    int wanted = left < LOW_WATER ? (int)left : LOW_WATER;
    if (wanted == p->low_water) return;
    setsockopt(p->fd, SOL_SOCKET, SO_RCVLOWAT, &wanted, sizeof wanted); /* without it there are more wakes, no more */
    p->low_water = wanted;
}

/* Move what the kernel takes or has. Whether a message came to its end, or the connection did. */
static int move(Peer *p, int direction) {
    Queue *q = &p->queues[direction];
    size_t total = 0;
    int ended = 0;
    while (q->first && !p->broken && total < MOST_AT_ONCE && !(direction == SENDING && is_held(q))) {
        Message *m = q->first;
        struct iovec at[2];
        struct msghdr message = {.msg_iov = at, .msg_iovlen = (size_t)pieces(m, at)};
        size_t asked = whole(m) - m->moved;
        ssize_t moved = direction == SENDING ? sendmsg(p->fd, &message, MSG_NOSIGNAL) : recvmsg(p->fd, &message, 0);
        if (moved < 0 && errno == EINTR) continue;
        if (moved < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) break;
        if (moved < 0 || (moved == 0 && asked)) {
            p->broken = moved < 0 ? errno : CLOSED;
            return 1;
        }
        m->moved += (size_t)moved;
        total += (size_t)moved;
        if (direction == RECEIVING && m->moved >= sizeof m->header && m->header != m->length) {
            p->told = m->header;
            p->broken = OTHER_LENGTH;
            return 1;
        }
        if (m->moved == whole(m)) {
            if (m->sum && direction == RECEIVING) m->sum->missing--;
            drop(q);
            q->finished++;
            ended = 1;
        } else if ((size_t)moved < asked) {
            break; /* it has no more */
        }
    }
    if (direction == RECEIVING && !p->broken) set_low_water(p);
    return ended;
}

/* Put a message at the end of its queue, and begin with it where it is the first. Which one it is, counted from 1. */
static uint64_t post(Mesh *mesh, Peer *p, int direction, uint8_t *data, uint64_t length, Sum *sum) {
    Message *m = malloc(sizeof *m);
    pthread_mutex_lock(&mesh->lock);
    Queue *q = &p->queues[direction];
    uint64_t number = ++q->posted;
    if (m) {
        *m = (Message){data, length, direction == SENDING ? length : 0, 0, sum, NULL};
        if (q->last) q->last->next = m;
        else q->first = m;
        q->last = m;
        if (q->first == m && direction == SENDING) move(p, SENDING);
        else if (q->first == m) set_low_water(p);
    } else {
        p->broken = ENOMEM;
    }
    pthread_mutex_unlock(&mesh->lock);
    return number;
}

/* ----------------------------------------------------------------------------------------------------------- sums */

#define BLOCK 1024 /* elements that are added while they lie in the first cache */

#define PLUS(a, b) ((a) + (b))

/* The sum of two bfloat16, to the nearest, of two equally near to the even one; what is no number stays none. */
static inline uint16_t plus_bf16(uint16_t a, uint16_t b) {
    uint32_t x = (uint32_t)a << 16, y = (uint32_t)b << 16, bits;
    float left, right;
    memcpy(&left, &x, sizeof left);
    memcpy(&right, &y, sizeof right);
    left += right;
    memcpy(&bits, &left, sizeof bits);
    uint16_t rounded = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    return left != left ? (uint16_t)0x7fc0 : rounded;
}

/* ((x0 + x1) + x2) + ..., whoever adds: other bits would be another model. */
#define ADDER(name, type, plus)                                                                  \
    static void name(const Sum *s) {                                                             \
        type block[BLOCK];                                                                       \
        for (size_t at = 0; at < s->numel; at += BLOCK) {                                        \
            size_t count = s->numel - at < BLOCK ? s->numel - at : BLOCK;                        \
            memcpy(block, (const type *)(const void *)s->terms[0] + at, count * sizeof(type));   \
            for (int i = 1; i < s->count; i++) {                                                 \
                const type *term = (const type *)(const void *)s->terms[i] + at;                 \
                for (size_t j = 0; j < count; j++) block[j] = plus(block[j], term[j]);           \
            }                                                                                    \
            memcpy((type *)(void *)s->total + at, block, count * sizeof(type));                  \
        }                                                                                        \
    }
ADDER(add_float, float, PLUS)
ADDER(add_double, double, PLUS)
ADDER(add_int, uint32_t, PLUS) /* signed ones wrap around alike */
ADDER(add_long, uint64_t, PLUS)
ADDER(add_bf16, uint16_t, plus_bf16)

static const struct {
    char name;
    size_t bytes;
    void (*add)(const Sum *);
} KINDS[] = {{'f', 4, add_float}, {'d', 8, add_double}, {'i', 4, add_int}, {'q', 8, add_long}, {'b', 2, add_bf16}};
enum { KIND_COUNT = sizeof KINDS / sizeof KINDS[0] };

/* Take the first sum off whose terms are all there. */
static Sum *ripe(Mesh *mesh) {
    for (Sum **link = &mesh->sums; *link; link = &(*link)->next) {
        Sum *s = *link;
        if (s->missing) continue;
        *link = s->next;
        return s;
    }
    return NULL;
}

/* Add what can be added; from then on the totals can be sent. The lock is open meanwhile, so that nobody is kept
 * waiting: this thread alone touches terms that have come. */
static void add_ripe(Mesh *mesh) {
    Sum *s;
    while (!mesh->stop && (s = ripe(mesh))) {
        pthread_mutex_unlock(&mesh->lock);
        KINDS[s->kind].add(s);
        pthread_mutex_lock(&mesh->lock);
        s->added = 1;
    }
}

/* ------------------------------------------------------------------------------------------------------ the thread */

/* DONE, LATE while something is missing, or BROKEN with the peer. */
static int state_of(const Mesh *mesh, const Waiter *w, int *peer) {
    int state = DONE;
    for (Py_ssize_t i = 0; i < w->count; i++) {
        const Peer *p = &mesh->peers[w->marks[i][0]];
        if (p->queues[w->marks[i][1]].finished >= w->marks[i][2]) continue;
        *peer = (int)w->marks[i][0];
        if (p->broken || mesh->stop) return BROKEN;
        state = LATE;
    }
    return state;
}

static void wake_waiters(Mesh *mesh) {
    int peer;
    for (Waiter *w = mesh->waiters; w; w = w->next)
        if (state_of(mesh, w, &peer) != LATE) pthread_cond_signal(&w->woken);
}

static int watch(const Mesh *mesh, struct pollfd *watched) {
    watched[0] = (struct pollfd){mesh->wakes[0], POLLIN, 0};
    for (int i = 0; i < mesh->size; i++) {
        const Peer *p = &mesh->peers[i];
        int events = (p->queues[RECEIVING].first ? POLLIN : 0) | (p->queues[SENDING].first && !is_held(&p->queues[SENDING]) ? POLLOUT : 0);
        /* one that has nothing to do is not watched: its end would be told again and again */
        watched[1 + i] = (struct pollfd){p->fd < 0 || p->broken || !events ? -1 : p->fd, (short)events, 0};
    }
    return 1 + mesh->size;
}

static void *run(void *given) {
    Mesh *mesh = given;
    struct pollfd *watched = malloc((size_t)(1 + mesh->size) * sizeof *watched);
    if (!watched) return NULL; /* waits end by their timeouts */
    pthread_mutex_lock(&mesh->lock);
    while (!mesh->stop) {
        int count = watch(mesh, watched), ended = 0;
        pthread_mutex_unlock(&mesh->lock);
        int ready = poll(watched, (nfds_t)count, LOOK_MS);
        pthread_mutex_lock(&mesh->lock);
        if (watched[0].revents) {
            uint8_t drained[256];
            while (read(mesh->wakes[0], drained, sizeof drained) > 0) {}
        }
        for (int i = 0; i < mesh->size && !mesh->stop; i++) {
            Peer *p = &mesh->peers[i];
            short events = watched[1 + i].revents;
            if (p->fd < 0 || watched[1 + i].fd < 0) continue;
            if (events & (POLLOUT | POLLERR | POLLHUP)) ended |= move(p, SENDING);
            if (events & (POLLIN | POLLERR | POLLHUP) || !ready) ended |= move(p, RECEIVING);
        }
        if (ended) wake_waiters(mesh);
        add_ripe(mesh);
    }
    pthread_mutex_unlock(&mesh->lock);
    free(watched);
    return NULL;
}

static void wake(const Mesh *mesh) {
    ssize_t written = write(mesh->wakes[1], "", 1); /* a full pipe wakes as well */
    (void)written;
}

/* ------------------------------------------------------------------------------------------------- Python's side */

#define NAME "distcomp.transports._sockets.Mesh"

static Mesh *mesh_of(PyObject *capsule) {
    Mesh *mesh = PyCapsule_GetPointer(capsule, NAME);
    if (mesh && mesh->stop) {
        PyErr_SetString(PyExc_RuntimeError, "the connections were closed");
        return NULL;
    }
    return mesh;
}

static void stop(Mesh *mesh) {
    if (mesh->process != getpid()) return;
    pthread_mutex_lock(&mesh->lock);
    int stopped = mesh->stop;
    mesh->stop = 1;
    wake_waiters(mesh);
    pthread_mutex_unlock(&mesh->lock);
    if (stopped) return;
    wake(mesh);
    pthread_join(mesh->thread, NULL);
    for (int i = 0; i < mesh->size; i++) {
        Peer *p = &mesh->peers[i];
        for (int direction = SENDING; direction <= RECEIVING; direction++)
            while (p->queues[direction].first) drop(&p->queues[direction]);
        if (p->fd >= 0) close(p->fd);
    }
    close(mesh->wakes[0]);
    close(mesh->wakes[1]);
}

static void release(PyObject *capsule) {
    Mesh *mesh = PyCapsule_GetPointer(capsule, NAME);
    Py_BEGIN_ALLOW_THREADS
    stop(mesh);
    Py_END_ALLOW_THREADS
    pthread_mutex_destroy(&mesh->lock);
    free(mesh->peers);
    free(mesh);
}

static int begin(Mesh *mesh) {
    if (pipe(mesh->wakes)) return 0;
    for (int i = 0; i < 2; i++) {
        fcntl(mesh->wakes[i], F_SETFL, O_NONBLOCK);
        fcntl(mesh->wakes[i], F_SETFD, FD_CLOEXEC);
    }
    pthread_mutex_init(&mesh->lock, NULL);
    if (!pthread_create(&mesh->thread, NULL, run, mesh)) return 1;
    pthread_mutex_destroy(&mesh->lock);
    close(mesh->wakes[0]);
    close(mesh->wakes[1]);
    return 0;
}

static PyObject *py_open(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *descriptors;
    if (!PyArg_ParseTuple(args, "O!", &PyTuple_Type, &descriptors)) return NULL;
    Mesh *mesh = calloc(1, sizeof *mesh);
    Peer *peers = calloc((size_t)PyTuple_Size(descriptors) + 1, sizeof *peers);
    if (!mesh || !peers) goto no_memory;
    mesh->size = (int)PyTuple_Size(descriptors);
    mesh->peers = peers;
    mesh->process = getpid();
    for (int i = 0; i < mesh->size; i++) {
        long fd = PyLong_AsLong(PyTuple_GetItem(descriptors, i));
        if (fd == -1 && PyErr_Occurred()) goto failed;
        peers[i].fd = (int)fd;
        if (fd < 0) continue;
        fcntl(peers[i].fd, F_SETFL, fcntl(peers[i].fd, F_GETFL) | O_NONBLOCK);
#ifdef SO_NOSIGPIPE
        setsockopt(peers[i].fd, SOL_SOCKET, SO_NOSIGPIPE, &(int){1}, sizeof(int));
#endif
    }
    if (!begin(mesh)) {
        PyErr_SetFromErrno(PyExc_OSError);
        goto failed;
    }
    PyObject *capsule = PyCapsule_New(mesh, NAME, release);
    if (capsule) return capsule;
    stop(mesh);
    goto failed;
no_memory:
    PyErr_NoMemory();
failed:
    free(peers);
    free(mesh);
    return NULL;
}

/* Read (peer, address, bytes); NULL with an error where there is no such peer. */
static Peer *peer_of(Mesh *mesh, PyObject *line, uint8_t **data, uint64_t *length) {
    Py_ssize_t peer;
    unsigned long long address, bytes;
    if (!PyArg_ParseTuple(line, "nKK", &peer, &address, &bytes)) return NULL;
    if (peer < 0 || peer >= mesh->size || mesh->peers[peer].fd < 0) {
        PyErr_Format(PyExc_ValueError, "there is no connection %zd", peer);
        return NULL;
    }
    *data = (uint8_t *)(uintptr_t)address;
    *length = bytes;
    return &mesh->peers[peer];
}

/* Post all receives, then all sends, and hand the kernel what it takes at once. */
static PyObject *py_exchange(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *capsule, *lists[2];
    if (!PyArg_ParseTuple(args, "OO!O!", &capsule, &PyTuple_Type, &lists[SENDING], &PyTuple_Type, &lists[RECEIVING]))
        return NULL;
    Mesh *mesh = mesh_of(capsule);
    if (!mesh) return NULL;
    PyObject *marks = PyTuple_New(PyTuple_Size(lists[SENDING]) + PyTuple_Size(lists[RECEIVING]));
    if (!marks) return NULL;
    Py_ssize_t at = 0;
    for (int direction = RECEIVING; direction >= SENDING; direction--)
        for (Py_ssize_t i = 0; i < PyTuple_Size(lists[direction]); i++, at++) {
            uint8_t *data;
            uint64_t length, number;
            Peer *p = peer_of(mesh, PyTuple_GetItem(lists[direction], i), &data, &length);
            if (!p) goto failed;
            Py_BEGIN_ALLOW_THREADS
            number = post(mesh, p, direction, data, length, NULL);
            Py_END_ALLOW_THREADS
            PyObject *mark = Py_BuildValue("niK", (Py_ssize_t)(p - mesh->peers), direction, (unsigned long long)number);
            if (!mark || PyTuple_SetItem(marks, at, mark)) goto failed;
        }
    wake(mesh);
    return marks;
failed:
    Py_DECREF(marks);
    return NULL;
}

/* Where the pieces of a tensor lie that ``count`` ranks add: as even as can be, the first ones longer. */
static size_t begin_of(size_t numel, int count, int piece) {
    size_t rest = numel % (size_t)count, at = (size_t)piece;
    return at * (numel / (size_t)count) + (at < rest ? at : rest);
}

/* The members' connections, in rank order; -1 where this rank is. 0 with an error where they are none. */
static int members_of(const Mesh *mesh, PyObject *list, int *members, int here) {
    for (int i = 0; i < (int)PyTuple_Size(list); i++) {
        long peer = PyLong_AsLong(PyTuple_GetItem(list, i));
        if (peer == -1 && PyErr_Occurred()) return 0;
        if (i != here && (peer < 0 || peer >= mesh->size || mesh->peers[peer].fd < 0))
            return PyErr_Format(PyExc_ValueError, "there is no connection %ld", peer), 0;
        members[i] = i == here ? -1 : (int)peer;
    }
    return 1;
}

#define PARTS 2
#define UNDIVIDED (256 * 1024) /* bytes of a sum that is not cut into parts */

/* A tensor, or a part of it, and the piece of it that this rank adds. */
typedef struct {
    Sum *sum;
    uint8_t *data;
    size_t numel;
} Part;

/* Lay out one part, with scratch for the others' terms; 0 without memory. */
static int lay_out(Part *part, int kind, int count, int here, uint8_t **scratch) {
    size_t bytes = KINDS[kind].bytes, begin = begin_of(part->numel, count, here);
    Sum *s = part->sum = malloc(sizeof *s + (size_t)count * sizeof *s->terms);
    if (!s) return 0;
    *s = (Sum){.kind = kind, .count = count, .messages = 2 * (count - 1), .missing = count - 1,
               .numel = begin_of(part->numel, count, here + 1) - begin, .total = part->data + begin * bytes};
    for (int i = 0; i < count; i++) {
        s->terms[i] = i == here ? s->total : *scratch;
        if (i != here) *scratch += s->numel * bytes;
    }
    return 1;
}

/* Post one message of every pair for a part: its terms, or its totals. The numbers, [member][direction]. The sum may
 * be over, and gone, as soon as its last message is posted. */
static void post_part(Mesh *mesh, const Part *part, const int *members, int here, int totals, uint64_t (*numbers)[2]) {
    Sum *s = part->sum;
    const int count = s->count;
    const size_t bytes = KINDS[s->kind].bytes;
    for (int shift = 1; shift < count; shift++)
        for (int direction = RECEIVING; direction >= SENDING; direction--) {
            int step = direction == SENDING ? shift : count - shift, member = (here + step) % count;
            int mine = (direction == SENDING) == totals, piece = mine ? here : member;
            size_t at = begin_of(part->numel, count, piece);
            uint64_t length = (begin_of(part->numel, count, piece + 1) - at) * bytes;
            uint8_t *where = part->data + at * bytes;
            if (direction == RECEIVING && !totals) where = (uint8_t *)(uintptr_t)s->terms[member];
            numbers[member][direction] =
                post(mesh, &mesh->peers[members[member]], direction, where, length, mine ? s : NULL);
        }
}

/* Post a sum. The second part's terms are on their way while the last of the first part's come. */
static void post_sum(Mesh *mesh, Part *parts, int count, const int *members, int here, uint64_t (*numbers)[2]) {
    pthread_mutex_lock(&mesh->lock);
    for (int i = 0; i < count; i++) {
        parts[i].sum->next = mesh->sums;
        mesh->sums = parts[i].sum;
    }
    pthread_mutex_unlock(&mesh->lock);
    for (int totals = 0; totals < 2; totals++)
        for (int i = 0; i < count; i++) post_part(mesh, &parts[i], members, here, totals, numbers);
}

/* Begin the sum of a tensor over members, in place; marks to wait for. Scratch holds the others' terms: for each
 * part as many elements as the longest piece of it, from each. */
static PyObject *py_sum(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *capsule, *list, *marks = NULL;
    int here, name, kind = 0;
    unsigned long long address, scratch;
    Py_ssize_t numel;
    if (!PyArg_ParseTuple(args, "OO!iCKnK", &capsule, &PyTuple_Type, &list, &here, &name, &address, &numel, &scratch))
        return NULL;
    Mesh *mesh = mesh_of(capsule);
    if (!mesh) return NULL;
    int count = (int)PyTuple_Size(list), laid = 0;
    while (kind < KIND_COUNT && KINDS[kind].name != name) kind++;
    if (kind == KIND_COUNT || count < 2 || here < 0 || here >= count || numel < 0)
        return PyErr_Format(PyExc_ValueError, "no sum of such a type, or over such members"), NULL;
    size_t bytes = KINDS[kind].bytes, whole_bytes = (size_t)numel * bytes, at = 0;
    int wanted = whole_bytes > UNDIVIDED ? PARTS : 1;
    Part parts[PARTS];
    uint8_t *next = (uint8_t *)(uintptr_t)scratch;
    int *members = malloc((size_t)count * sizeof *members);
    uint64_t (*numbers)[2] = malloc((size_t)count * sizeof *numbers);
    marks = PyTuple_New(2 * (count - 1));
    if (!members || !numbers || !marks) goto no_memory;
    if (!members_of(mesh, list, members, here)) goto failed;
    for (; laid < wanted; laid++) {
        size_t end = begin_of((size_t)numel, wanted, laid + 1);
        parts[laid] = (Part){NULL, (uint8_t *)(uintptr_t)address + at * bytes, end - at};
        at = end;
        if (!lay_out(&parts[laid], kind, count, here, &next)) goto no_memory;
    }
    Py_BEGIN_ALLOW_THREADS
    post_sum(mesh, parts, wanted, members, here, numbers);
    Py_END_ALLOW_THREADS
    laid = 0; /* their messages own them */
    wake(mesh);
    for (int i = 0, mark_at = 0; i < count; i++)
        for (int direction = SENDING; i != here && direction <= RECEIVING; direction++, mark_at++) {
            unsigned long long number = numbers[i][direction];
            PyObject *mark = Py_BuildValue("niK", (Py_ssize_t)members[i], direction, number);
            if (!mark || PyTuple_SetItem(marks, mark_at, mark)) goto failed;
        }
    goto end;
no_memory:
    PyErr_NoMemory();
failed:
    Py_CLEAR(marks);
    while (laid) free(parts[--laid].sum);
end:
    free(members);
    free(numbers);
    return marks;
}

/* Sleep until woken; whether the seconds are over. By a clock that nobody sets. */
static int sleep_on(pthread_cond_t *woken, pthread_mutex_t *lock, double seconds) {
    struct timespec at = {(time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9)};
#ifdef __APPLE__
    return pthread_cond_timedwait_relative_np(woken, lock, &at) == ETIMEDOUT;
#else
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    long ns = now.tv_nsec + at.tv_nsec;
    at = (struct timespec){now.tv_sec + at.tv_sec + ns / 1000000000, ns % 1000000000};
    return pthread_cond_timedwait(woken, lock, &at) == ETIMEDOUT;
#endif
}

static void init_condition(pthread_cond_t *condition) {
    pthread_condattr_t how;
    pthread_condattr_init(&how);
#ifndef __APPLE__
    pthread_condattr_setclock(&how, CLOCK_MONOTONIC);
#endif
    pthread_cond_init(condition, &how);
    pthread_condattr_destroy(&how);
}

/* One slice of a wait. */
static int wait_a_little(Mesh *mesh, Waiter *w, double seconds, int *peer) {
    int state, timed_out = 0;
    pthread_mutex_lock(&mesh->lock);
    w->next = mesh->waiters;
    mesh->waiters = w;
    while ((state = state_of(mesh, w, peer)) == LATE && !timed_out)
        timed_out = sleep_on(&w->woken, &mesh->lock, seconds);
    Waiter **link = &mesh->waiters;
    while (*link != w) link = &(*link)->next;
    *link = w->next;
    pthread_mutex_unlock(&mesh->lock);
    return state;
}

static int marks_of(Mesh *mesh, PyObject *list, Waiter *w) {
    w->count = PyTuple_Size(list);
    w->marks = malloc((size_t)(w->count ? w->count : 1) * sizeof *w->marks);
    if (!w->marks) return PyErr_NoMemory(), 0;
    for (Py_ssize_t i = 0; i < w->count; i++) {
        unsigned long long peer, direction, number;
        if (!PyArg_ParseTuple(PyTuple_GetItem(list, i), "KKK", &peer, &direction, &number)) return 0;
        if (peer >= (unsigned long long)mesh->size || direction > RECEIVING)
            return PyErr_Format(PyExc_ValueError, "mark %zd is none of this mesh", i), 0;
        w->marks[i][0] = peer;
        w->marks[i][1] = direction;
        w->marks[i][2] = number;
    }
    return 1;
}

/* (state, peer, why, length that was told) */
static PyObject *py_wait(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *capsule, *list, *answer = NULL;
    double left_s;
    if (!PyArg_ParseTuple(args, "OO!d", &capsule, &PyTuple_Type, &list, &left_s)) return NULL;
    Mesh *mesh = mesh_of(capsule);
    if (!mesh) return NULL;
    Waiter w = {0};
    init_condition(&w.woken);
    if (marks_of(mesh, list, &w)) {
        int state, peer = -1;
        do {
            double slice_s = left_s < SLICE_S ? left_s : SLICE_S;
            Py_BEGIN_ALLOW_THREADS
            state = wait_a_little(mesh, &w, slice_s, &peer);
            Py_END_ALLOW_THREADS
            left_s -= slice_s;
            if (PyErr_CheckSignals()) goto end;
        } while (state == LATE && left_s > 0);
        Peer none = {0}, *p = peer < 0 ? &none : &mesh->peers[peer];
        answer = Py_BuildValue("iiiK", state, peer, p->broken, (unsigned long long)p->told);
    }
end:
    free(w.marks);
    pthread_cond_destroy(&w.woken);
    return answer;
}

static PyObject *py_close(PyObject *self, PyObject *capsule) {
    (void)self;
    Mesh *mesh = PyCapsule_GetPointer(capsule, NAME);
    if (!mesh) return NULL;
    Py_BEGIN_ALLOW_THREADS
    stop(mesh);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"open", py_open, METH_VARARGS, "A mesh over connected sockets, one for each rank (-1: none), which it owns."},
    {"exchange", py_exchange, METH_VARARGS, "Post (peer, address, bytes) to send and to receive; marks to wait for."},
    {"sum", py_sum, METH_VARARGS, "Begin the sum of a tensor over members, in place; marks to wait for."},
    {"wait", py_wait, METH_VARARGS, "Wait for marks: state, peer, why, length."},
    {"close", py_close, METH_O, "End the thread, and close the connections."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_sockets", "Messages between ranks, moved by a thread of C.", -1, methods, NULL, NULL,
    NULL, NULL,
};

PyMODINIT_FUNC PyInit__sockets(void) { return PyModule_Create(&module); }
