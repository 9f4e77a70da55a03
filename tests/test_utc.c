/* The time that log lines begin with is libc's. */
#include <criterion/criterion.h>
#include <time.h>

#include "utc.h"

static void expect_same(uint64_t seconds)
{
    char ours[SKV_UTC_BYTES], theirs[SKV_UTC_BYTES];
    time_t when = (time_t)seconds;
    struct tm utc;
    gmtime_r(&when, &utc);
    strftime(theirs, sizeof theirs, "%Y-%m-%dT%H:%M:%S", &utc);
    skv_utc_text(ours, seconds);
    cr_assert_str_eq(ours, theirs, "%llu", (unsigned long long)seconds);
}

Test(utc, every_day_of_nine_centuries)
{
    for (uint64_t day = 0; day < 330000; day++) {
        expect_same(day * 86400);
        expect_same(day * 86400 + 86399);
    }
}

Test(utc, every_second_of_a_day)
{
    for (uint64_t second = 0; second < 86400; second++)
        expect_same(UINT64_C(1795824000) + second);
}
