//! What a neighbour can send on a local socket: datagrams that claim to be a message.
#![no_main]

use blixard_ipc::frame::Assembler;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|parts: Vec<Vec<u8>>| {
    let mut assembler = Assembler::new(4096);
    for part in parts {
        match assembler.push(&part) {
            Ok(Some(message)) => assert!(message.len() <= 4096),
            Ok(None) => {}
            Err(_) => return,
        }
    }
});
