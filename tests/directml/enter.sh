#!/bin/sh
# enter.sh ROOT COMMAND...: runs a command in the Debian system in ROOT. /proc and /dev are mounted for this command alone.
set -e
exec unshare --mount sh -c '
    mount -t proc proc "$0/proc"
    mount --rbind /dev "$0/dev"
    exec chroot "$0" /usr/bin/env -i HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 DEBIAN_FRONTEND=noninteractive \
        ${http_proxy:+http_proxy="$http_proxy"} "$@"' "$@"
