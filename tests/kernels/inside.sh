# Runs as process 1 of a kernel under test: python inside.py program
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
mount -t bpf bpf /sys/fs/bpf
PYTHONDONTWRITEBYTECODE=1 HOME=/tmp "$1" "$2" "$3"
echo o > /proc/sysrq-trigger
while :; do read -r _ < /dev/zero || :; done
