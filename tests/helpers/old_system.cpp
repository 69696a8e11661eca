// Part of every library that tests/helpers/old_system.cmake links. From glibc 2.32 on this byte says whether the
// process has one thread alone, and the headers and the C++ library of a newer system ask for it. An older glibc has
// none: no, then.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = false;
