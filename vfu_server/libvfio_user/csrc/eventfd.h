#ifndef VS_EVENTFD_H
#define VS_EVENTFD_H

void vs_signal_fd(int fd);
void vs_drain_fd(int fd);

#endif
