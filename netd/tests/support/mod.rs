//! A network namespace per test, and guests made of a TAP descriptor and hand-written frames.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, OwnedFd};
use std::process::Command;
use std::sync::Once;
use std::time::{Duration, Instant};

use blixard_netd::Node;
use blixard_netd::firewall::link_local;
use blixard_netd_api::{NetworkSpec, NicSpec, Subnet};
use blixard_vmm_api::config::MacAddr;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

pub const BROADCAST: MacAddr = MacAddr([0xff; 6]);
/// Length of the virtio-net header before each frame.
const HEADER: usize = 12;
const PATIENCE: Duration = Duration::from_secs(10);

/// Puts the calling thread into a network namespace of its own. `None`, and a line that says so, where that is impossible.
pub fn alone() -> Option<Node> {
    if !namespace() {
        return None;
    }
    Some(Node::open().unwrap())
}

/// As [`alone`], without the node.
pub fn namespace() -> bool {
    if let Some(reason) = impossible() {
        static SAID: Once = Once::new();
        // Not by println: what a passing test prints is not shown, and a skipped one must be seen.
        let line = format!("skipped: tests in a network namespace ({reason})\n");
        SAID.call_once(|| std::io::stderr().write_all(line.as_bytes()).unwrap());
        return false;
    }
    ip("link set lo up");
    true
}

fn impossible() -> Option<String> {
    for (program, package) in [("ip", "iproute2"), ("nft", "nftables"), ("setpriv", "util-linux")] {
        if Command::new(program).arg("--version").output().is_err() {
            return Some(format!("{program} is missing: install {package}"));
        }
    }
    if let Err(error) = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET) {
        return Some(format!("{error}: run as root"));
    }
    File::open("/dev/net/tun").err().map(|error| format!("/dev/net/tun: {error}"))
}

/// Runs a command that must succeed and answers its output.
pub fn run(program: &str, arguments: &str) -> String {
    let output = Command::new(program).args(arguments.split_whitespace()).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

pub fn ip(arguments: &str) -> String {
    run("ip", arguments)
}

pub fn nft(arguments: &str) -> String {
    run("nft", arguments)
}

/// With br_netfilter, which Docker loads, frames inside a bridge also pass the packet filter of IP. Answers whether this
/// kernel has it and it is now on (or off).
pub fn frames_pass_the_ip_filter(on: bool) -> bool {
    let switch = "/proc/sys/net/bridge/bridge-nf-call-iptables";
    let there = std::fs::write(switch, if on { "1" } else { "0" }).is_ok();
    there || !on
}

pub fn subnet(text: &str) -> Subnet {
    let (gateway, prefix) = text.split_once('/').unwrap();
    Subnet { gateway: gateway.parse().unwrap(), prefix: prefix.parse().unwrap() }
}

pub fn network(name: &str, subnets: &[&str], nat: bool) -> NetworkSpec {
    NetworkSpec { name: name.into(), subnets: subnets.iter().map(|s| subnet(s)).collect(), nat, mtu: 1500 }
}

pub fn default_network() -> NetworkSpec {
    network("default", &["10.88.0.1/16", "fd88::1/64"], true)
}

/// The nic number `n` of a network, with these addresses.
pub fn nic(n: u8, network: &str, addresses: &[&str]) -> NicSpec {
    NicSpec {
        id: format!("bxv00000000{n:02}-0").parse().unwrap(),
        network: network.into(),
        mac: MacAddr([0x52, 0x54, 0, 0, 0, n]),
        addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
    }
}

/// A guest's end of a nic.
pub struct Guest {
    pub tap: File,
    pub mac: MacAddr,
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
}

impl Guest {
    pub fn new(spec: &NicSpec, tap: OwnedFd) -> Self {
        let v4 = spec.addresses.iter().find_map(|a| if let IpAddr::V4(a) = a { Some(*a) } else { None });
        let v6 = spec.addresses.iter().find_map(|a| if let IpAddr::V6(a) = a { Some(*a) } else { None });
        let unspecified = (Ipv4Addr::UNSPECIFIED, Ipv6Addr::UNSPECIFIED);
        Self {
            tap: tap.into(),
            mac: spec.mac,
            v4: v4.unwrap_or(unspecified.0),
            v6: v6.unwrap_or(unspecified.1),
        }
    }

    pub fn ensure(node: &Node, spec: &NicSpec) -> Self {
        Self::new(spec, node.ensure_nic(spec, true).unwrap().unwrap())
    }

    pub fn link_local(&self) -> Ipv6Addr {
        link_local(self.mac)
    }

    pub fn send(&mut self, frame: &[u8]) {
        let bytes = [[0; HEADER].as_slice(), frame].concat();
        assert_eq!(self.tap.write(&bytes).unwrap(), bytes.len());
    }

    /// Frames as they come, until `wanted` answers something.
    pub fn receive<T>(&mut self, mut wanted: impl FnMut(&[u8]) -> Option<T>) -> T {
        let until = Instant::now() + PATIENCE;
        loop {
            let mut buffer = vec![0; 70_000];
            match self.tap.read(&mut buffer) {
                Ok(length) => {
                    if let Some(found) = wanted(&buffer[HEADER..length]) {
                        return found;
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let left = until.saturating_duration_since(Instant::now()).as_millis();
                    assert!(left > 0, "the awaited frame does not come");
                    let timeout = PollTimeout::try_from(i32::try_from(left).unwrap()).unwrap();
                    poll(&mut [PollFd::new(self.tap.as_fd(), PollFlags::POLLIN)], timeout).unwrap();
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// All frames until the one that contains `fence`.
    pub fn receive_until(&mut self, fence: &[u8]) -> Vec<Vec<u8>> {
        let mut seen = Vec::new();
        self.receive(|frame| {
            let end = contains(frame, fence);
            seen.push(frame.to_vec());
            end.then_some(())
        });
        seen
    }
}

/// Tries again while `busy`. A program that another test starts in this moment has, until its exec, a copy of every
/// descriptor of this process, a TAP that was just closed among them.
pub fn when_free<T, E: std::fmt::Debug>(
    mut open: impl FnMut() -> Result<T, E>,
    busy: impl Fn(&E) -> bool,
) -> T {
    let until = Instant::now() + PATIENCE;
    loop {
        match open() {
            Err(error) if busy(&error) && Instant::now() < until => std::thread::yield_now(),
            result => return result.unwrap(),
        }
    }
}

pub fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

/// An Ethernet frame.
pub fn ethernet(to: MacAddr, from: MacAddr, kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = [to.0.as_slice(), &from.0, &kind.to_be_bytes(), payload].concat();
    frame.resize(frame.len().max(60), 0);
    frame
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let mut sum: u32 =
        bytes.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], *c.get(1).unwrap_or(&0)]))).sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!u16::try_from(sum).unwrap()).to_be_bytes()
}

fn length(bytes: &[u8], more: usize) -> [u8; 2] {
    u16::try_from(bytes.len() + more).unwrap().to_be_bytes()
}

/// An IPv4 packet (RFC 791).
pub fn ipv4(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let [l0, l1] = length(payload, 20);
    let mut header = vec![0x45, 0, l0, l1, 0, 0, 0, 0, 64, protocol, 0, 0];
    header.extend(from.octets());
    header.extend(to.octets());
    let sum = checksum(&header);
    header[10..12].copy_from_slice(&sum);
    [header, payload.to_vec()].concat()
}

/// A UDP datagram without a checksum (RFC 768), for IPv4.
pub fn udp(from: u16, to: u16, payload: &[u8]) -> Vec<u8> {
    [&from.to_be_bytes(), &to.to_be_bytes(), &length(payload, 8), [0, 0].as_slice(), payload].concat()
}

/// An echo request (RFC 792).
pub fn echo(payload: &[u8]) -> Vec<u8> {
    icmp([8, 0, 0, 0, 0, 1, 0, 1], payload)
}

/// The news that a port is closed, with the packet that it is about (RFC 792).
pub fn unreachable(packet: &[u8]) -> Vec<u8> {
    icmp([3, 3, 0, 0, 0, 0, 0, 0], packet)
}

fn icmp(head: [u8; 8], payload: &[u8]) -> Vec<u8> {
    let mut message = [head.as_slice(), payload].concat();
    let sum = checksum(&message);
    message[2..4].copy_from_slice(&sum);
    message
}

/// An IPv6 packet (RFC 8200) with a checksum at `sum_at` of its payload.
pub fn ipv6(from: Ipv6Addr, to: Ipv6Addr, next: u8, payload: &[u8], sum_at: usize) -> Vec<u8> {
    let mut payload = payload.to_vec();
    let pseudo =
        [&from.octets()[..], &to.octets(), &[0, 0], &length(&payload, 0), &[0, 0, 0, next], &payload];
    let sum = checksum(&pseudo.concat());
    payload[sum_at..sum_at + 2].copy_from_slice(&sum);
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(length(&payload, 0));
    packet.extend([next, 255]);
    packet.extend(from.octets());
    packet.extend(to.octets());
    [packet, payload].concat()
}

/// A UDP datagram in IPv6.
pub fn udp6(from: Ipv6Addr, to: Ipv6Addr, ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
    ipv6(from, to, 17, &udp(ports.0, ports.1, payload), 6)
}

/// An ICMPv6 message of this type (RFC 4443): four bytes of flags or identifier, then `payload`.
pub fn icmp6(from: Ipv6Addr, to: Ipv6Addr, kind: u8, payload: &[u8]) -> Vec<u8> {
    ipv6(from, to, 58, &[[kind, 0, 0, 0, 0x60, 0, 0, 0].as_slice(), payload].concat(), 2)
}

/// An ARP packet for IPv4 over Ethernet (RFC 826).
pub fn arp(operation: u8, from: (MacAddr, Ipv4Addr), to: (MacAddr, Ipv4Addr)) -> Vec<u8> {
    let head = [0, 1, 8, 0, 6, 4, 0, operation];
    [&head[..], &from.0.0, &from.1.octets(), &to.0.0, &to.1.octets()].concat()
}

pub const IPV4: u16 = 0x0800;
pub const ARP: u16 = 0x0806;
pub const IPV6: u16 = 0x86dd;
