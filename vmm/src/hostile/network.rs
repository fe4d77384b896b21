//! What a guest can put into the queues of devices with a peer, a network card and vsock, while the peer talks and goes.

use std::io::{Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};

use blixard_vmm_api::config::MacAddr;
use blixard_vmm_api::guest::{LINK_PORT, LinkRecord};
use blixard_vmm_api::rate::{Bucket, RateLimit};

use super::Input;
use super::driver::drive;
use crate::virtio::device::Device;
use crate::virtio::guest_driver::{Buffer, Machine};
use crate::virtio::net::{Net, Parts};
use crate::virtio::net_tap::Tap;
use crate::virtio::vsock::Vsock;
use crate::virtio::vsock_packet::{HOST_CID, Header, Operation, TYPE_STREAM};

/// Checksums, offloads by command, segmentation, mergeable buffers, control queue, announcements, several pairs.
const FEATURES: [u64; 8] = [1 << 1, 1 << 2, 1 << 7, 1 << 15, 1 << 17, 1 << 21, 1 << 22, 1 << 22 | 1 << 17];
/// Bytes of `struct virtio_net_hdr_v1`.
const FRAME_HEADER: usize = 12;

/// Offers a chain; when the queue is full, descriptors are used again.
fn offer<D: Device>(machine: &mut Machine<D>, queue: usize, buffers: &[Buffer]) {
    if machine.queues[queue].post(buffers).is_none() {
        machine.queues[queue].forget();
    }
    machine.device.on_kick(queue as u16, &mut machine.events);
}

/// The queues of a network card, its control queue among them, while frames arrive.
pub(super) fn net(data: &[u8]) {
    let mut input = Input::new(data);
    let (bits, mode) = (input.byte(), input.byte());
    let chosen = FEATURES.iter().enumerate().filter(|(n, _)| bits >> n & 1 == 1);
    let features = chosen.fold(0, |all, (_, feature)| all | feature);
    let (mut taps, mut wires) = (vec![], vec![]);
    for _ in 0..2 {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        taps.push(Tap::from_datagrams(ours.into()).unwrap());
        wires.push(theirs);
    }
    let second = taps.pop().unwrap();
    let mut parts = Parts::new(taps.pop().unwrap(), MacAddr([2; 6]), 1500);
    parts.taps.push(second);
    let bucket = |bit: u8| (mode & bit != 0).then_some(Bucket { size: 3000, burst: 3000, refill_ms: 1 });
    parts.receive_limit.bytes = bucket(1);
    parts.send_limit = RateLimit { bytes: bucket(2), operations: None };
    let mut machine = Machine::start(Net::new(parts).unwrap(), features, mode & 4 == 0);
    let control = if features & (1 << 22) != 0 { 4 } else { 2 };
    drive(&mut machine, &mut input, |machine, input| {
        let what = input.byte();
        let pair = usize::from(what & 1);
        let at = machine.buffers + 4096 * u64::from(input.byte());
        match what >> 1 & 7 {
            0 | 1 => {
                let length = FRAME_HEADER + usize::from(input.short());
                let mut frame = vec![what; length];
                let head = input.bytes(FRAME_HEADER);
                frame[..head.len()].copy_from_slice(head);
                drop(wires[pair].send(&frame));
            }
            2 => drop(wires[pair].recv(&mut [0; 100])),
            3 => machine.device.announce(),
            4 => {
                let length = u32::from(input.short());
                let rest = Buffer::Writable(at + u64::from(length), 2000);
                offer(machine, 2 * pair, &[Buffer::Writable(at, length), rest]);
            }
            5 => {
                machine.put(at, input.bytes(FRAME_HEADER));
                let length = u32::from(input.short()) % 3000;
                let head = Buffer::Readable(at, FRAME_HEADER as u32);
                offer(machine, 2 * pair + 1, &[head, Buffer::Readable(at + 64, length)]);
            }
            _ => {
                let (class, command) = (3 + input.byte() % 4, input.byte() % 2);
                machine.put(at, &[class, command]);
                machine.put(at + 2, &input.long().to_le_bytes());
                offer(machine, control, &[Buffer::Readable(at, 10), Buffer::Writable(at + 16, 1)]);
            }
        }
    });
}

fn listener() -> (UnixListener, SocketAddr) {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    // The kernel forgets such a name with its socket.
    let name = format!("blixard-hostile-{}-{}", process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let address = SocketAddr::from_abstract_name(name).unwrap();
    (UnixListener::bind_addr(&address).unwrap(), address)
}

fn datagram_pair() -> [OwnedFd; 2] {
    let mut fds = [-1; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: the call writes two descriptors, to `fds`.
    assert_eq!(unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) }, 0);
    // SAFETY: the kernel just made them for us.
    fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A header of this guest for this host, so that the input need not guess it.
fn packet(input: &mut Input<'_>) -> Header {
    let kind = input.byte();
    let port = |byte: u8| if byte & 1 == 0 { LINK_PORT } else { (1 << 30) + u32::from(byte >> 1 & 7) };
    // Request, response, reset, shutdown, data, credit update, credit request, and what is none.
    let operation = u16::from(kind & 7);
    Header {
        source_cid: 3,
        destination_cid: HOST_CID,
        source_port: u32::from(input.byte() % 4),
        destination_port: port(input.byte()),
        length: if operation == 5 { u32::from(input.byte()) * 5 } else { 0 },
        kind: TYPE_STREAM + u16::from(kind >> 7),
        operation: Operation::Unknown(operation),
        flags: u32::from(kind >> 3 & 3),
        buffer_size: u32::from(input.short()),
        forwarded: u32::from(input.short()),
    }
}

/// The queues of the vsock device while clients of the host come, talk and go.
pub(super) fn vsock(data: &[u8]) {
    let mut input = Input::new(data);
    let mode = input.byte();
    let (listener, address) = listener();
    let (mut device, sender) = Vsock::new(3, listener.into(), Box::new(drop)).unwrap();
    let [hook, taker] = datagram_pair();
    if mode & 2 != 0 {
        device.set_hook(hook).unwrap();
    }
    let mut machine = Machine::start(device, 0, mode & 1 == 1);
    let mut clients: Vec<UnixStream> = vec![];
    drive(&mut machine, &mut input, |machine, input| {
        let what = input.byte();
        let at = machine.buffers + 4096 * u64::from(what >> 4);
        match what & 15 {
            0 | 1 => {
                if let Ok(mut client) = UnixStream::connect_addr(&address) {
                    client.set_nonblocking(true).unwrap();
                    let line = format!("CONNECT {}\n", what >> 4);
                    let _ = client.write(if what & 1 == 0 { line.as_bytes() } else { input.bytes(9) });
                    clients.push(client);
                }
            }
            2 => drop(clients.last().map(|mut client| client.write(&[7; 3000]))),
            3 => drop(clients.last().map(|mut client| client.read(&mut [0; 3000]))),
            4 => drop(clients.pop()),
            5 => {
                if !clients.is_empty() {
                    clients.rotate_left(1);
                }
            }
            6 => sender.send(LinkRecord::Stop),
            7 => drop(crate::passing::receive(&taker, &mut [0; 8])),
            8..=10 => offer(machine, 0, &[Buffer::Writable(at, 44), Buffer::Writable(at + 64, 3000)]),
            _ => {
                let header = packet(input);
                let length = header.length;
                machine.put(at, &header.to_bytes());
                // The guest link's records are small.
                machine.put(at + 64, input.bytes(length.min(16) as usize));
                if length == 0 {
                    offer(machine, 1, &[Buffer::Readable(at, 44)]);
                } else {
                    offer(machine, 1, &[Buffer::Readable(at, 44), Buffer::Readable(at + 64, length)]);
                }
            }
        }
    });
}
