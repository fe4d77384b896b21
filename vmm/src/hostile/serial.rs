//! What a guest can do to the registers of the serial port, while the console takes output and types.

use std::sync::Arc;

use super::Input;
use super::registers::Nowhere;
use crate::devices::ioapic::IoApic;
use crate::devices::serial::{INPUT_MAX, OUTPUT_MAX, Serial};
use crate::mailbox::{Mailbox, Message};
use crate::snapshot::codec::{Reader, Writer};

/// Most bytes of one burst: more than both buffers hold.
const BURST: usize = OUTPUT_MAX + 10;

fn port(mailbox: &Arc<Mailbox>) -> Serial {
    Serial::new(Arc::new(IoApic::new(Arc::new(Nowhere))), mailbox.clone(), Arc::default())
}

fn saved(serial: &Serial) -> Vec<u8> {
    let mut to = Writer::new();
    serial.save(&mut to);
    to.into_bytes()
}

/// Registers of the port.
pub(super) fn serial(data: &[u8]) {
    let mut input = Input::new(data);
    let mailbox = Arc::new(Mailbox::new().unwrap());
    let mut serial = port(&mailbox);
    let (mut output, mut told) = (vec![], false);
    while !input.is_empty() {
        let (step, value) = (input.byte(), input.byte());
        let register = u16::from(step >> 4);
        match step & 15 {
            0..=5 => serial.write(register, value),
            6..=8 => {
                serial.read(register);
            }
            9 => {
                let count = usize::from(value) * 128 % BURST;
                (0..count).for_each(|_| serial.write(0, value));
            }
            10 => {
                serial.type_in(&vec![value; usize::from(value) * 8]);
            }
            11 => {
                for _ in 0..usize::from(value) * 8 {
                    serial.read(0);
                }
            }
            12 => {
                // What the console does when it is told.
                told |= mailbox.take().contains(&Message::Serial);
                if std::mem::take(&mut told) {
                    output.clear();
                    serial.take_output(&mut output);
                    assert!(output.len() <= OUTPUT_MAX);
                }
            }
            _ => {
                // It goes on as another one, as after a restore; what was printed is with the console by then.
                told |= mailbox.take().contains(&Message::Serial);
                serial.take_output(&mut vec![]);
                let before = saved(&serial);
                serial = port(&mailbox);
                serial.restore(&mut Reader::new(&before)).unwrap();
                assert_eq!(saved(&serial), before, "what is restored is what was saved");
            }
        }
        assert!(serial.room() <= INPUT_MAX);
    }
    // Nothing that was printed is forgotten: either the I/O thread has been told, or there is nothing.
    told |= mailbox.take().contains(&Message::Serial);
    let mut rest = vec![];
    serial.take_output(&mut rest);
    assert!(rest.is_empty() || told, "{} bytes of output that nobody is told of", rest.len());
    // A console that found no room is told when there is some.
    serial.type_in(&[0; INPUT_MAX]);
    assert_eq!(serial.room(), 0);
    serial.write(3, 0);
    for _ in 0..INPUT_MAX {
        serial.read(0);
    }
    assert!(mailbox.take().contains(&Message::Serial), "nobody is told that there is room again");
}
