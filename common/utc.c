#include "utc.h"

#include <stdio.h>

void skv_utc_text(char text[SKV_UTC_BYTES], uint64_t seconds)
{
    /* Days since 1 March of the year 0; 400 years have 146,097. Years that begin in March end with
     * their odd day. */
    uint64_t days = seconds / 86400 + 719468, of_day = seconds % 86400;
    uint64_t era = days / 146097, day = days % 146097;
    uint64_t year = (day - day / 1460 + day / 36524 - day / 146096) / 365;
    day -= year * 365 + year / 4 - year / 100;
    uint64_t month = (day * 5 + 2) / 153; /* 0: March; five months have 153 days */
    day -= (month * 153 + 2) / 5;
    month = month < 10 ? month + 3 : month - 9;
    year += era * 400 + (month < 3);
    snprintf(text, SKV_UTC_BYTES, "%04u-%02u-%02uT%02u:%02u:%02u", (unsigned)year, (unsigned)month,
             (unsigned)day + 1, (unsigned)(of_day / 3600), (unsigned)(of_day / 60 % 60),
             (unsigned)(of_day % 60));
}
