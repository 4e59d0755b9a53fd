/*
 * Runs Linux's own tests of VFIO at a network card's virtual function, in a guest inside the test machine.
 *
 * The guest has an IOMMU of its own. What the programs print is for who reads the console; each begins with a line
 * "program NAME" and ends with a line "result: NAME, exit status N".
 */
#include "inner.h"

#include <sys/wait.h>

#define PROGRAMS "/selftests"

static int
program_names(const struct dirent *one)
{
    return strncmp(one->d_name, "vfio_", 5) == 0;
}

static int
run(const char *name)
{
    char path[512];
    int status = 0;
    pid_t child;

    snprintf(path, sizeof(path), PROGRAMS "/%s", name);
    printf("program %s\n", name);
    child = fork();
    if (child == 0) {
        execl(path, path, bdf, NULL);
        _exit(127);
    }
    if (child < 0 || waitpid(child, &status, 0) != child) {
        fail(path);
    }
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

int
main(void)
{
    struct dirent **names;
    char path[512];
    int count;

    start("0x10ca");
    put("/proc/sys/vm/nr_hugepages", "4");
    put("/sys/bus/pci/drivers/igbvf/unbind", bdf);
    snprintf(path, sizeof(path), DEVICES "/%s/driver_override", bdf);
    put(path, "vfio-pci");
    put("/sys/bus/pci/drivers_probe", bdf);
    count = scandir(PROGRAMS, &names, program_names, alphasort);
    if (count < 1) {
        fail(PROGRAMS);
    }
    for (int at = 0; at < count; at++) {
        printf("result: %s, exit status %d\n", names[at]->d_name, run(names[at]->d_name));
    }
    done();
}
