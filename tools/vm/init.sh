#!/busybox sh
# Process 1 of the test machine. It runs in the initial memory file system, which stays the root; /usr is Debian's, on the
# first disk.
# Everything that varies was put beside it: /modules/*.ko in loading order, /shares (tag, folder, options), /job.

PATH=/usr/sbin:/usr/bin:/applets
export PATH HOME=/root LC_ALL=C.UTF-8 TERM=dumb

/busybox mount -t proc proc /proc
/busybox mount -t sysfs sysfs /sys
/busybox mount -t devtmpfs devtmpfs /dev
/busybox mkdir -p /dev/pts /dev/shm
/busybox mount -t devpts devpts /dev/pts
/busybox mount -t tmpfs tmpfs /dev/shm
/busybox mount -t tmpfs tmpfs /tmp
/busybox mount -t tmpfs tmpfs /run
/busybox mount -t debugfs debugfs /sys/kernel/debug 2>/dev/null
/busybox ln -s /proc/self/fd /dev/fd
/busybox mkdir /applets
/busybox --install -s /applets

for module in /modules/*.ko; do
    [ ! -e "$module" ] || /busybox insmod "$module" || echo "init: $module was not loaded"
done
/busybox mount -t squashfs -o ro /dev/vda /usr || echo "init: no /usr"
while read -r tag folder options; do
    /busybox mkdir -p "$folder"
    /busybox mount -t 9p -o "trans=virtio,version=9p2000.L,$options" "$tag" "$folder" || echo "init: no share $tag"
done </shares
/busybox ip link set lo up

echo "init: starting the job at $(/busybox cut -d ' ' -f 1 /proc/uptime) s"
/busybox sh /job >/results/stdout 2>/results/stderr </dev/null
status=$?
echo "init: the job ended with status $status at $(/busybox cut -d ' ' -f 1 /proc/uptime) s"
echo "$status" >/results/status
/busybox sync
/busybox poweroff -f
