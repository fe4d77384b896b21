//! What a guest can write into the queues of a network card, its control queue among them, while frames arrive.
#![no_main]

mod hostile;

use std::os::unix::net::UnixDatagram;

use blixard_vmm::virtio::guest_driver::Machine;
use blixard_vmm::virtio::net::{Net, Parts};
use blixard_vmm::virtio::net_tap::Tap;
use blixard_vmm_api::config::MacAddr;
use hostile::{Input, drive};
use libfuzzer_sys::fuzz_target;

/// Checksums, offloads by command, segmentation, mergeable buffers, control queue, announcements, several pairs.
const FEATURES: [u64; 8] = [1 << 1, 1 << 2, 1 << 7, 1 << 15, 1 << 17, 1 << 21, 1 << 22, 1 << 22 | 1 << 17];

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let bits = input.byte().unwrap_or(0);
    let features = FEATURES.iter().enumerate().filter(|(n, _)| bits >> n & 1 == 1).fold(0, |all, (_, f)| all | f);
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
    let mut machine = Machine::start(Net::new(parts).unwrap(), features, bits & 1 == 1);
    drive(&mut machine, &mut input, |machine, input| {
        let what = input.byte().unwrap_or(0);
        let wire = &wires[usize::from(what & 1)];
        match what >> 1 & 3 {
            0 | 1 => drop(wire.send(&vec![what; usize::from(what) * 257 + 1])),
            2 => drop(wire.recv(&mut [0; 100])),
            _ => machine.device.announce(),
        }
    });
});
