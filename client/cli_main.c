/* sidekv: the command line of the cache. This file is main(), the table of commands and the parser
 * of their options; it opens nothing itself. A command line that is wrong is refused before the
 * daemon hears of it. */
#include "cli.h"

#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "log.h"
#include "refused.h"

enum option_bits {
    OPTION_JSON = 1 << 0,
    OPTION_COUNT = 1 << 1,
    OPTION_LIMIT = 1 << 2,
    OPTION_MODEL = 1 << 3,
    OPTION_KEY = 1 << 4,
};

enum operands { NONE, ID, ID_TOKENS, TOPIC };

static int help(const struct cli *cli);

static const struct command {
    const char *name;
    const char *arguments;
    const char *text;
    unsigned options; /* enum option_bits, besides --socket and --help */
    enum operands operands;
    int (*run)(const struct cli *cli);
} commands[] = {
    {"ping", "[-c N]", "round trips to the daemon: fastest, median, slowest", OPTION_COUNT, NONE,
     cli_ping},
    {"stats", "[--json]", "the daemon's counters", OPTION_JSON, NONE, cli_stats},
    {"users", "[--limit N] [--model HEX] [--json]", "the users that are cached",
     OPTION_JSON | OPTION_LIMIT | OPTION_MODEL, NONE, cli_users},
    {"user", "ID|--key HEX [--model HEX] [--json]", "one user",
     OPTION_JSON | OPTION_MODEL | OPTION_KEY, ID, cli_user},
    {"evict", "ID|--key HEX [--model HEX]", "store a user, then free its pool pages",
     OPTION_MODEL | OPTION_KEY, ID, cli_evict},
    {"forget", "ID|--key HEX [--model HEX]", "remove a user everywhere; done when it is durable",
     OPTION_MODEL | OPTION_KEY, ID, cli_forget},
    {"truncate", "ID|--key HEX TOKENS [--model HEX]",
     "keep a user's first TOKENS, rounded down to whole pages", OPTION_MODEL | OPTION_KEY,
     ID_TOKENS, cli_truncate},
    {"flush", "", "return when everything committed is stored", 0, NONE, cli_flush},
    {"restart", "", "start the daemon anew under its keeper, keeping the pool", 0, NONE,
     cli_restart},
    {"replay", "LOG | --generate ...", "the main job: serve a request log; see replay --help", 0,
     NONE, NULL},
    {"help", "[COMMAND]", "what a command does and takes", 0, TOPIC, help},
};

#define COMMANDS (sizeof commands / sizeof *commands)

static const struct option_text {
    unsigned bit; /* 0: every command */
    const char *name, *text;
} option_texts[] = {
    {0, "--socket PATH", "the daemon's socket (or SIDEKV_SOCKET; default " SKV_DEFAULT_SOCKET ")"},
    {OPTION_JSON, "--json", "one JSON document on stdout"},
    {OPTION_COUNT, "-c, --count N", "round trips (default 100)"},
    {OPTION_LIMIT, "--limit N", "at most N users (default: all)"},
    {OPTION_MODEL, "--model HEX", "only this model's fingerprint, 32 hex digits (default: all)"},
    {OPTION_KEY, "--key HEX", "the user by key, 32 hex digits as `users` prints them; no ID then"},
    {0, "-h, --help", "this text"},
};

static void print_help(FILE *out)
{
    fprintf(out, "usage: sidekv [--socket PATH] COMMAND [ARGUMENT...]\n\ncommands:\n");
    for (size_t i = 0; i < COMMANDS; i++)
        fprintf(out, "  %-9s %s\n", commands[i].name, commands[i].text);
    fprintf(out,
            "\noptions:\n"
            "  --socket PATH  the daemon's socket (or SIDEKV_SOCKET; default %s)\n"
            "  -V, --version  print the version\n"
            "  -h, --help     this text; `sidekv help COMMAND` for one command\n\n"
            "ID: digits are an integer user, anything else a named one.\n"
            "Exit codes: 0 done, 1 failed, 2 wrong command line.\n",
            SKV_DEFAULT_SOCKET);
}

static void print_command_help(const struct command *command)
{
    printf("usage: sidekv %s%s%s\n\n%s\n\noptions:\n", command->name,
           *command->arguments ? " " : "", command->arguments, command->text);
    for (size_t i = 0; i < sizeof option_texts / sizeof *option_texts; i++)
        if (!option_texts[i].bit || option_texts[i].bit & command->options)
            printf("  %-14s %s\n", option_texts[i].name, option_texts[i].text);
}

static int usage(const char *command, const char *what, const char *which)
{
    fprintf(stderr, "sidekv: %s%s; try: sidekv %s%s%s\n", what, which, command ? command : "",
            command ? " " : "", "--help");
    return CLI_USAGE;
}

static const struct command *find(const char *name)
{
    for (size_t i = 0; i < COMMANDS; i++)
        if (strcmp(commands[i].name, name) == 0)
            return &commands[i];
    return NULL;
}

/* ---- words to values ---- */

static bool parse_number(const char *text, uint64_t most, uint64_t *out)
{
    if (*text < '0' || *text > '9')
        return false;
    char *end;
    errno = 0;
    *out = strtoull(text, &end, 10);
    return errno == 0 && *end == '\0' && *out <= most;
}

void cli_print_hex(char out[CLI_HEX_BYTES], struct skv_id id)
{
    snprintf(out, CLI_HEX_BYTES, "%016" PRIx64 "%016" PRIx64, id.hi, id.lo);
}

bool cli_parse_hex(const char *text, struct skv_id *out)
{
    if (strlen(text) != 32 || strspn(text, "0123456789abcdefABCDEF") != 32)
        return false;
    char high[17];
    memcpy(high, text, 16);
    high[16] = '\0';
    *out = (struct skv_id){.lo = strtoull(text + 16, NULL, 16), .hi = strtoull(high, NULL, 16)};
    return true;
}

struct skv_id cli_parse_user(const char *text)
{
    uint64_t integer;
    return parse_number(text, UINT64_MAX, &integer) ? skv_user_integer(integer)
                                                    : skv_user_string(text);
}

static void name_user(struct cli *cli, const char *text)
{
    char hex[CLI_HEX_BYTES];
    cli_print_hex(hex, cli->user);
    if (!text)
        snprintf(cli->user_text, sizeof cli->user_text, "user %s", hex);
    else if (cli->user.hi == 0)
        snprintf(cli->user_text, sizeof cli->user_text, "user %" PRIu64, cli->user.lo);
    else
        snprintf(cli->user_text, sizeof cli->user_text, "user \"%.40s\" (%s)", text, hex);
}

/* ---- one command's line ---- */

enum { SOCKET = 256, JSON, LIMIT, MODEL, KEY };

static const struct option long_options[] = {
    {"socket", required_argument, NULL, SOCKET},
    {"json", no_argument, NULL, JSON},
    {"count", required_argument, NULL, 'c'},
    {"limit", required_argument, NULL, LIMIT},
    {"model", required_argument, NULL, MODEL},
    {"key", required_argument, NULL, KEY},
    {"help", no_argument, NULL, 'h'},
    {0},
};

static unsigned bit_of(int option)
{
    switch (option) {
    case JSON:
        return OPTION_JSON;
    case 'c':
        return OPTION_COUNT;
    case LIMIT:
        return OPTION_LIMIT;
    case MODEL:
        return OPTION_MODEL;
    case KEY:
        return OPTION_KEY;
    }
    return 0;
}

static const char *name_of(int option)
{
    const struct option *o = long_options;
    while (o->name && o->val != option)
        o++;
    return o->name ? o->name : "?";
}

static int parse_operands(const struct command *command, bool has_key, int argc, char **argv,
                          struct cli *cli)
{
    bool user = command->operands == ID || command->operands == ID_TOKENS;
    const char *id = NULL;
    if (user && !has_key) {
        if (argc < 1 || !*argv[0])
            return usage(command->name, "which user? ID is missing", "");
        id = argv[0];
        cli->user = cli_parse_user(id);
        argc--, argv++;
    }
    if (user)
        name_user(cli, id);
    if (command->operands == ID_TOKENS) {
        uint64_t tokens;
        if (argc < 1 || !parse_number(argv[0], SKV_MAX_TOKENS, &tokens))
            return usage(command->name,
                         "TOKENS must be a number up to 32768: ", argc < 1 ? "(nothing)" : argv[0]);
        cli->tokens = (uint32_t)tokens;
        argc--, argv++;
    }
    if (command->operands == TOPIC && argc > 0) {
        cli->topic = argv[0];
        argc--, argv++;
    }
    return argc ? usage(command->name, "not understood: ", argv[0]) : CLI_OK;
}

static int run_command(const struct command *command, struct cli *cli, int argc, char **argv)
{
    static const char letters[] = ":c:h";
    bool has_key = false;
    uint64_t number;
    optind = 0; /* a new vector: start anew */
    opterr = 0;
    for (int option; (option = getopt_long(argc, argv, letters, long_options, NULL)) != -1;) {
        if (option == 'h') {
            print_command_help(command);
            return CLI_OK;
        }
        if (option == ':')
            return usage(command->name, "a value is missing: ", argv[optind - 1]);
        if (option == '?')
            return usage(command->name, "no such option: ", skv_refused_option(argv, letters));
        if (option != SOCKET && !(bit_of(option) & command->options))
            return usage(command->name, "not an option of this command: ", name_of(option));
        bool good = true;
        switch (option) {
        case SOCKET:
            cli->socket = optarg;
            break;
        case JSON:
            cli->json = true;
            break;
        case 'c':
            good = parse_number(optarg, 10000000, &number) && number > 0;
            cli->count = good ? (uint32_t)number : 0;
            break;
        case LIMIT:
            good = parse_number(optarg, UINT64_MAX, &cli->limit);
            break;
        case MODEL:
            good = cli_parse_hex(optarg, &cli->model);
            break;
        case KEY:
            good = has_key = cli_parse_hex(optarg, &cli->user);
            break;
        }
        if (!good)
            return usage(command->name, "a value that does not fit: ", optarg);
    }
    int status = parse_operands(command, has_key, argc - optind, argv + optind, cli);
    return status ? status : command->run(cli);
}

static int help(const struct cli *cli)
{
    if (!cli->topic) {
        print_help(stdout);
        return CLI_OK;
    }
    const struct command *command = find(cli->topic);
    if (!command)
        return usage(NULL, "no such command: ", cli->topic);
    if (!command->run)
        return cli_replay(2, (char *[]){"replay", "--help", NULL}, NULL);
    print_command_help(command);
    return CLI_OK;
}

static int run(int argc, char **argv)
{
    static const struct option options[] = {{"socket", required_argument, NULL, 's'},
                                            {"version", no_argument, NULL, 'V'},
                                            {"help", no_argument, NULL, 'h'},
                                            {0}};
    static const char letters[] = "+:hV";
    struct cli cli = {.count = 100, .limit = UINT64_MAX};
    skv_log_init("sidekv", SKV_LOG_WARN);
    opterr = 0;
    for (int option; (option = getopt_long(argc, argv, letters, options, NULL)) != -1;) {
        switch (option) {
        case 's':
            cli.socket = optarg;
            break;
        case 'V':
            puts("sidekv " SKV_VERSION);
            return CLI_OK;
        case 'h':
            print_help(stdout);
            return CLI_OK;
        case ':':
            return usage(NULL, "a value is missing: ", argv[optind - 1]);
        default:
            return usage(NULL, "no such option: ", skv_refused_option(argv, letters));
        }
    }
    if (optind == argc) {
        print_help(stderr);
        return CLI_USAGE;
    }
    argc -= optind;
    argv += optind;
    const struct command *command = find(argv[0]);
    if (!command)
        return usage(NULL, "no such command: ", argv[0]);
    if (command->run)
        return run_command(command, &cli, argc, argv);
    optind = 0;
    opterr = 1;
    return cli_replay(argc, argv, cli.socket);
}

/* Most of what is printed only leaves the process here: a full disk is known now, or never. */
int main(int argc, char **argv)
{
    int status = run(argc, argv);
    if (!fflush(stdout) && !ferror(stdout))
        return status;
    fputs("sidekv: the output is not complete: it could not be written\n", stderr);
    return status ? status : CLI_FAILED;
}
