//! What a guest can write into the queues of the vsock device while clients of the host come, talk and go.
#![no_main]

mod hostile;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use blixard_vmm::virtio::guest_driver::Machine;
use blixard_vmm::virtio::vsock::Vsock;
use hostile::{Input, drive};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let event_idx = input.byte().unwrap_or(0) & 1 == 1;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vsock");
    let listener = UnixListener::bind(&path).unwrap();
    let (device, sender) = Vsock::new(3, listener.into(), Box::new(drop)).unwrap();
    let mut machine = Machine::start(device, 0, event_idx);
    // A header of this guest for this host, so that the input need not guess it.
    let header = [&3u64.to_le_bytes()[..], &2u64.to_le_bytes(), &(1u32 << 30).to_le_bytes(), &1u32.to_le_bytes()].concat();
    for slot in 0..64 {
        machine.put(machine.buffers + slot * 64, &header);
    }
    let mut clients: Vec<UnixStream> = vec![];
    drive(&mut machine, &mut input, |_, input| match input.byte().unwrap_or(0) % 6 {
        0 | 1 => {
            if let Ok(mut client) = UnixStream::connect(&path) {
                client.set_nonblocking(true).unwrap();
                let _ = client.write(b"CONNECT 1\n");
                clients.push(client);
            }
        }
        2 => drop(clients.last().map(|mut client| client.write(&[7; 3000]))),
        3 => drop(clients.last().map(|mut client| client.read(&mut [0; 3000]))),
        4 => drop(clients.pop()),
        _ => sender.send(blixard_vmm_api::guest::LinkRecord::Stop),
    });
});
