/* Which option getopt_long() has just refused, for the programs' messages. */
#ifndef SKV_REFUSED_H
#define SKV_REFUSED_H

#include <getopt.h>
#include <string.h>

/* After its '?': the letter, as "-x", or the word of a long option. optind passes a word of letters
 * only with its last one: argv[optind - 1] may be the word before. `letters` is getopt_long()'s
 * third argument: one of these is in optopt where a long option got a value that it does not take.
 * The text is valid until the next call. */
static inline const char *skv_refused_option(char **argv, const char *letters)
{
    static char letter[] = "-?";
    if (optopt <= ' ' || optopt > '~' || strchr(letters, optopt))
        return argv[optind - 1];
    letter[1] = (char)optopt;
    return letter;
}

#endif
