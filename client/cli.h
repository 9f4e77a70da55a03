/* The command line: one table of commands, one parser of options, one function a command.
 *
 *   cli_main.c    the table, options, help, exit codes
 *   cli_admin.c   looking and managing, over an admin session
 *   cli_replay.c  replay, with options of its own
 *
 * Exit codes: 0 done; 1 it failed, and stderr says why and what to do; 2 the command line is
 * wrong. */
#ifndef SKV_CLI_H
#define SKV_CLI_H

#include "hash.h"
#include "sidekv.h"

enum cli_exit { CLI_OK = 0, CLI_FAILED = 1, CLI_USAGE = 2 };

/* What the command line of one command says. */
struct cli {
    const char *socket; /* NULL: the library's default */
    bool json;
    uint32_t count;      /* -c */
    uint64_t limit;      /* --limit; UINT64_MAX: all */
    struct skv_id model; /* --model; zero: all */
    struct skv_id user;  /* ID or --key */
    char user_text[96];  /* the user in words, for messages */
    uint32_t tokens;     /* TOKENS of truncate */
    const char *topic;   /* COMMAND of help; NULL: all */
};

int cli_ping(const struct cli *cli);
int cli_stats(const struct cli *cli);
int cli_users(const struct cli *cli);
int cli_user(const struct cli *cli);
int cli_evict(const struct cli *cli);
int cli_forget(const struct cli *cli);
int cli_truncate(const struct cli *cli);
int cli_flush(const struct cli *cli);
int cli_restart(const struct cli *cli);

/* argv[0] is "replay"; socket as given, or NULL: start a private daemon. Parses its own options
 * (optind is reset), --help included. Returns an exit code. */
int cli_replay(int argc, char **argv, const char *socket);

/* 32 hex digits, as all ids are printed but those of integer users. */
#define CLI_HEX_BYTES 33
void cli_print_hex(char out[CLI_HEX_BYTES], struct skv_id id);
bool cli_parse_hex(const char *text, struct skv_id *out);
/* A user of digits that fit u64 is that integer; anything else is the hash of its bytes. */
struct skv_id cli_parse_user(const char *text);

#endif
