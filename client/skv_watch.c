/* The watcher thread: one a connection, asleep in poll() until the socket or the stop eventfd says
 * something. The socket means "the daemon is alive"; its one message after the handshake is the
 * goodbye. When the daemon is gone the watcher opens every gate, so that no stream, and no caller,
 * waits for something that nobody will send. It uses no CUDA. */
#include "skv_session.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

/* Status before gates: who sees a gate that this opened sees the status too. A status that the
 * daemon set before says more, but then the pass is as worthless. */
static void open_gates(struct skv *skv)
{
    uint32_t layers = skv->options.geometry.layers;
    for (uint32_t row = 0; row < skv->options.rows; row++) {
        uint32_t *words = skv_gate_row(skv, row);
        __atomic_store_n(&words[layers], (uint32_t)SKV_ELOST, __ATOMIC_RELEASE);
        skv_failpoint(FAIL_client_opening);
        for (uint32_t layer = 0; layer < layers; layer++)
            skv_gate_store(&words[layer], 1);
    }
}

void skv_session_lose(struct skv *skv, const char *format, ...)
{
    /* Pairs with skv_lost(). */
    if (__atomic_exchange_n(&skv->lost, 1, __ATOMIC_ACQ_REL))
        return;
    open_gates(skv);
    shutdown(skv->link.socket, SHUT_RDWR);   /* a daemon that still lives fences the session */
    shutdown(skv->link.cq_event, SHUT_RDWR); /* wakes a caller that sleeps */

    char reason[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(reason, sizeof reason, format, arguments);
    va_end(arguments);
    skv_warn("session %llu on %s is lost: %s", (unsigned long long)skv->link.welcome.session,
             skv->path, reason);
}

/* The socket is readable: a goodbye, a hang-up, or nonsense. False: look again later. */
static bool read_goodbye(struct skv *skv)
{
    struct wire_goodbye goodbye;
    ssize_t got = recv(skv->link.socket, &goodbye, sizeof goodbye, MSG_DONTWAIT | MSG_TRUNC);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return false;
    bool kept = skv->link.welcome.pool_id != 0;
    bool restarts = got == sizeof goodbye && goodbye.status == SKV_EAGAIN;
    /* Before `lost`, which the caller's thread reads with acquire. */
    __atomic_store_n(&skv->coming, restarts || (got <= 0 && kept), __ATOMIC_RELAXED);
    if (got <= 0) {
        skv_session_lose(skv, "the daemon has gone");
    } else if (got != sizeof goodbye || goodbye.magic != WIRE_MAGIC) {
        skv_session_lose(skv, "the daemon sent a message that is not of this protocol");
    } else {
        char text[sizeof goodbye.text];
        snprintf(text, sizeof text, "%.*s", (int)sizeof text - 1, goodbye.text);
        for (char *c = text; *c; c++)
            if (*c < 0x20 || *c >= 0x7f)
                *c = '?';
        skv_session_lose(skv, "the daemon ended it: %s (%s)", text, skv_strerror(goodbye.status));
    }
    return true;
}

static void *watch(void *argument)
{
    struct skv *skv = argument;
    for (;;) {
        struct pollfd fds[2] = {{.fd = skv->link.socket, .events = POLLIN},
                                {.fd = skv->stop_event, .events = POLLIN}};
        if (poll(fds, 2, -1) < 0 && errno != EINTR) {
            skv_session_lose(skv, "poll: %s", strerror(errno));
            return NULL;
        }
        if (fds[1].revents)
            return NULL;
        if (fds[0].revents && read_goodbye(skv))
            return NULL;
    }
}

int skv_watch_start(struct skv *skv)
{
    /* The host process's signals are its own. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&skv->watcher, NULL, watch, skv);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error) {
        skv_error("no watcher thread: %s", strerror(error));
        return SKV_ENOMEM;
    }
    return SKV_OK;
}

void skv_watch_stop(struct skv *skv)
{
    eventfd_write(skv->stop_event, 1);
    pthread_join(skv->watcher, NULL);
    eventfd_t drained;
    eventfd_read(skv->stop_event, &drained);
}
