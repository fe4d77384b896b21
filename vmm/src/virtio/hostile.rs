//! Bytes become what a hostile driver does: for fuzz targets. Nothing here knows what a device should answer; it only must
//! not panic, hang or touch what is not its own.

#![cfg_attr(
    not(test),
    expect(clippy::indexing_slicing, clippy::cast_possible_truncation, reason = "not part of the program")
)]

use std::time::Duration;

use super::device::Device;
use super::guest_driver::{Buffer, Machine};

/// Most steps of one run.
const STEPS: usize = 200;

/// Bytes that are used up.
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// These bytes.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// The next byte; 0 behind the end.
    pub fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    /// The next four bytes as a number.
    pub fn word(&mut self) -> u32 {
        u32::from_le_bytes([self.byte(), self.byte(), self.byte(), self.byte()])
    }

    /// Whether all is used up.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A guest address: mostly one inside memory, sometimes any.
    pub fn address(&mut self) -> u64 {
        match self.byte() {
            0 => u64::from(self.word()) << 20,
            1 => u64::MAX - u64::from(self.byte()),
            kind => u64::from(self.word() & 0xFF_FFFF) & !if kind & 1 == 0 { 0xFFF } else { 0 },
        }
    }

    /// A length of a buffer: mostly a small one.
    pub fn length(&mut self) -> u32 {
        match self.byte() {
            0 => self.word(),
            kind @ 1..=9 => u32::from(kind) * 4096,
            kind @ 10..=90 => u32::from(kind),
            _ => [1, 4, 8, 16, 20, 512][usize::from(self.byte()) % 6],
        }
    }

    fn buffers(&mut self) -> Vec<Buffer> {
        let count = usize::from(self.byte() % 6);
        let mut buffers: Vec<Buffer> = (0..count)
            .map(|_| match self.byte() & 1 {
                0 => Buffer::Readable(self.address(), self.length()),
                _ => Buffer::Writable(self.address(), self.length()),
            })
            .collect();
        if self.byte() > 10 {
            buffers.sort_by_key(|buffer| matches!(buffer, Buffer::Writable(..)));
        }
        buffers
    }
}

/// Drives the device as `input` says; `special` does what only this kind of device knows.
pub fn drive<D: Device>(
    machine: &mut Machine<D>,
    input: &mut Input<'_>,
    mut special: impl FnMut(&mut Machine<D>, &mut Input<'_>),
) {
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        let step = input.byte();
        let count = machine.queues.len();
        let queue = usize::from(input.byte()) % count;
        let index = queue as u16;
        match step % 12 {
            0..=2 => {
                let buffers = input.buffers();
                machine.queues[queue].post(&buffers);
            }
            3 => {
                let (table, buffers) = (machine.buffers + 4096 * u64::from(input.byte()), input.buffers());
                machine.queues[queue].post_indirect(table, &buffers);
            }
            4 => {
                let (address, length) = (input.address(), input.length());
                let (flags, next) = (input.word() as u16 & 7, input.byte().into());
                machine.queues[queue].descriptor(input.byte() as u16 % 64, address, length, flags, next);
            }
            5 => machine.queues[queue].available_index(input.word() as u16),
            6 => machine.queues[queue].available_entry(input.byte().into(), input.word() as u16),
            7 => {
                let at = machine.buffers + u64::from(input.word() & 0xF_FFFF);
                let bytes: Vec<u8> = (0..input.byte()).map(|_| input.byte()).collect();
                machine.put(at, &bytes);
            }
            8 => {
                machine.events.turn(&mut machine.device, Duration::ZERO);
            }
            9 => match input.byte() % 4 {
                0 => {
                    machine.reset();
                    machine.activate();
                }
                paused => machine.device.on_pause(paused == 1, &mut machine.events),
            },
            10 => {
                let bytes = input.word().to_le_bytes();
                machine.device.config().write(input.byte().into(), &bytes);
            }
            _ => special(machine, input),
        }
        machine.device.on_kick(index, &mut machine.events);
    }
    machine.device.on_pause(false, &mut machine.events);
    machine.reset();
    assert_eq!(machine.events.watched(), 0);
}
