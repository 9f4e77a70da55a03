/* Included before everything where coverage is measured (SAN=cov): a child process that ends by
 * _exit() writes down what it ran, too. */
#ifndef COVERAGE_EXIT_H
#define COVERAGE_EXIT_H

#include <unistd.h>

void __gcov_dump(void);

static inline _Noreturn void coverage_exit(int status)
{
    __gcov_dump();
    _exit(status);
}
#define _exit coverage_exit

#endif
