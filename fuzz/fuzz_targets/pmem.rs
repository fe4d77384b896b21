//! What a guest can put into the queue of a persistent memory.
#![no_main]

use blixard_vmm::virtio::block_engine::Engine;
use blixard_vmm::virtio::guest_driver::{Buffer, Machine};
use blixard_vmm::virtio::hostile::{Input, drive};
use blixard_vmm::virtio::pmem::{ALIGNMENT, Pmem};
use libfuzzer_sys::fuzz_target;

thread_local! {
    /// All runs share one file.
    static FILE: std::fs::File = {
        let file = tempfile::tempfile().expect("a temporary file");
        file.set_len(ALIGNMENT).expect("its size");
        file
    };
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let mode = input.byte();
    let file = FILE.with(|file| file.try_clone().expect("a descriptor"));
    let engine = if mode & 1 == 0 { Engine::plain } else { Engine::new };
    let device = Pmem::with_engine(file.into(), mode & 2 != 0, engine).expect("a device");
    let mut machine = Machine::start(device, 0, mode & 4 == 0);
    drive(&mut machine, &mut input, |machine, input| {
        let at = machine.buffers + 16 * u64::from(input.byte());
        machine.put(at, &u32::from(input.byte() / 128).to_le_bytes());
        machine.queues[0].post(&[Buffer::Readable(at, 4), Buffer::Writable(at + 8, 4)]);
    });
});
