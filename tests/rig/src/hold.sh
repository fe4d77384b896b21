# Runs once in an emulated host, before its snapshot: keeps in use what the kernel patches its code for at the first use and
# after the last one (jump labels). QEMU before 8.1 translates code that another processor may be patching: the breakpoint of
# a patch stays in a translation, and processors run into it for ever. So all is patched before anything depends on the host.
# The limit's control group has no process; the rest is held by one process with a network namespace of its own.

# `__cfs_bandwidth_used`, all over the scheduler: a limit of processor time. `cpusets_enabled_key`, all over the allocation of
# memory: a group with a set of processors. While an inner group may have both, nobody takes them from the outer ones.
group=/sys/fs/cgroup/rig-hold
mkdir -p "$group/inner" && echo "+cpu +cpuset" >/sys/fs/cgroup/cgroup.subtree_control &&
    echo "+cpu +cpuset" >"$group/cgroup.subtree_control" && echo 1000 100000 >"$group/cpu.max" ||
    { echo no limit of processor time or no set of processors can be made; exit 1; }

# Keys of hash functions, made at the first connection: nobody needs to answer
perl -e 'use Socket qw(:DEFAULT SOCK_NONBLOCK); for (pack_sockaddr_in(9, INADDR_LOOPBACK), pack_sockaddr_in6(9, IN6ADDR_LOOPBACK)) {
    socket(my $socket, sockaddr_family($_), SOCK_STREAM | SOCK_NONBLOCK, 0) or exit 1;
    connect($socket, $_);
}' || { echo no socket can be made; exit 1; }

setsid -w unshare --net perl -e '
    use strict;
    # `nf_hooks_needed`: packet filters at every hook
    open(my $nft, "|-", "nft", "-f", "-") or exit 1;
    for my $family ("inet", "bridge") {
        print $nft "add table $family hold\n";
        for my $hook ("prerouting", "input", "forward", "output", "postrouting") {
            print $nft "add chain $family hold $hook { type filter hook $hook priority 0; }\n";
        }
    }
    close($nft) or exit 1;
    # `preempt_notifier_key` in __schedule: KVM_CREATE_VM
    open(my $kvm, "+<", "/dev/kvm") or exit 1;
    my $descriptor = ioctl($kvm, 0xAE01, 0) or exit 1;
    open(my $vm, "+<&=", $descriptor) or exit 1;
    # `apic_sw_disabled` in KVM: a processor that has not switched its interrupt controller on.
    # KVM_ENABLE_CAP of KVM_CAP_SPLIT_IRQCHIP (121) with 24 routes, KVM_CREATE_VCPU
    my $split = pack("L2 Q12", 121, 0, 24, (0) x 11);
    ioctl($vm, 0x4068AEA3, $split) or exit 1;
    my $processor = ioctl($vm, 0xAE41, 0) or exit 1;
    defined(my $child = fork) or exit 1;
    exit if $child;
    sleep
' </dev/null >/dev/null 2>&1 || { echo no VM or no packet filter can be made; exit 1; }
