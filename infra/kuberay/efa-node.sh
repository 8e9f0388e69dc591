#!/bin/sh
# What EFA needs of a GPU node before its kubelet starts: user data of the node group, or of Karpenter's EC2NodeClass.
# `eksctl` with efaEnabled, and AMIs that have it, do the first themselves; doing it again does no harm.
set -eu
root=${ROOT:-}

# libfabric's buffers: 5120 MiB in pages of 2 MiB, as the pod asks for, and some that the driver takes.
mkdir -p "$root/etc/sysctl.d" "$root/etc/systemd/system/containerd.service.d"
echo 'vm.nr_hugepages = 5128' > "$root/etc/sysctl.d/90-efa-hugepages.conf"
sysctl --load "$root/etc/sysctl.d/90-efa-hugepages.conf"

# EFA registers memory, which must not be swapped. Containers inherit containerd's limit, and a process that is not root
# gets no more by IPC_LOCK.
printf '[Service]\nLimitMEMLOCK=infinity\n' > "$root/etc/systemd/system/containerd.service.d/90-efa-memlock.conf"
systemctl daemon-reload
systemctl try-restart containerd
