//! Just enough of rtnetlink(7) to give a guest its addresses: three kinds of message and their acknowledgement.
//! Layouts: Linux `include/uapi/linux/netlink.h`, `rtnetlink.h`, `if_addr.h`, `if_link.h`; all in host byte order.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, setsockopt,
    socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const NLMSG_ERROR: u16 = 2;
/// `NLM_F_REQUEST | NLM_F_ACK`
const REQUEST: u16 = 0x1 | 0x4;
/// `NLM_F_REPLACE | NLM_F_CREATE`
const PUT: u16 = 0x100 | 0x400;
const IFF_UP: u32 = 1;
const IFLA_MTU: u16 = 4;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
/// No duplicate address detection: the host hands out each address once, and waiting costs a second of every boot.
const IFA_F_NODAD: u8 = 2;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_STATIC: u8 = 4;
const RTN_UNICAST: u8 = 1;
/// The gateway is on the link although no address says so.
const RTNH_F_ONLINK: u32 = 4;
/// Length of the header `nlmsghdr`.
const HEADER: usize = 16;

/// One request, without its header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    kind: u16,
    flags: u16,
    body: Vec<u8>,
}

fn family(address: IpAddr) -> u8 {
    // AF_INET and AF_INET6 (include/linux/socket.h)
    if address.is_ipv4() { 2 } else { 10 }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(a) => a.octets().into(),
        IpAddr::V6(a) => a.octets().into(),
    }
}

impl Message {
    fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.body.extend(length.to_ne_bytes());
        self.body.extend(kind.to_ne_bytes());
        self.body.extend(value);
        self.body.resize(self.body.len().next_multiple_of(4), 0);
        self
    }

    /// Brings an interface up, with this MTU if any.
    pub fn up(index: i32, mtu: Option<u16>) -> Self {
        let mut body = vec![0; 4];
        body.extend(index.to_ne_bytes());
        body.extend(IFF_UP.to_ne_bytes());
        body.extend(IFF_UP.to_ne_bytes());
        let message = Self { kind: RTM_NEWLINK, flags: REQUEST, body };
        match mtu {
            Some(mtu) => message.attribute(IFLA_MTU, &u32::from(mtu).to_ne_bytes()),
            None => message,
        }
    }

    /// Gives an interface an address.
    pub fn address(index: i32, address: IpAddr, prefix: u8) -> Self {
        let mut body = vec![family(address), prefix, IFA_F_NODAD, 0];
        body.extend(index.to_ne_bytes());
        Self { kind: RTM_NEWADDR, flags: REQUEST | PUT, body }
            .attribute(IFA_LOCAL, &octets(address))
            .attribute(IFA_ADDRESS, &octets(address))
    }

    /// Sends everything else to `gateway`; `on_link` if no address of the interface has it in its prefix.
    pub fn default_route(index: i32, gateway: IpAddr, on_link: bool) -> Self {
        let mut body = vec![family(gateway), 0, 0, 0, RT_TABLE_MAIN, RTPROT_STATIC, 0, RTN_UNICAST];
        body.extend(if on_link { RTNH_F_ONLINK } else { 0 }.to_ne_bytes());
        Self { kind: RTM_NEWROUTE, flags: REQUEST | PUT, body }
            .attribute(RTA_OIF, &index.to_ne_bytes())
            .attribute(RTA_GATEWAY, &octets(gateway))
    }

    fn encode(&self, sequence: u32) -> Vec<u8> {
        let length = u32::try_from(HEADER + self.body.len()).unwrap_or(u32::MAX);
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(self.kind.to_ne_bytes());
        bytes.extend(self.flags.to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(&self.body);
        bytes
    }
}

/// The kernel's answer to request `sequence` in `bytes`, if it is there.
fn answer(mut bytes: &[u8], sequence: u32) -> Option<io::Result<()>> {
    loop {
        let [l0, l1, l2, l3, k0, k1, _, _, s0, s1, s2, s3, _, _, _, _, ..] = *bytes else { return None };
        let length = usize::try_from(u32::from_ne_bytes([l0, l1, l2, l3])).ok()?;
        let message = bytes.get(HEADER..length)?;
        if u16::from_ne_bytes([k0, k1]) == NLMSG_ERROR && u32::from_ne_bytes([s0, s1, s2, s3]) == sequence {
            let code = i32::from_ne_bytes(message.get(..4)?.try_into().ok()?);
            let failed = code.checked_neg().filter(|errno| *errno > 0);
            return Some(failed.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno))));
        }
        bytes = bytes.get(length.next_multiple_of(4)..)?;
    }
}

/// A socket to the kernel's routing tables.
pub struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    /// Opens the socket.
    ///
    /// # Errors
    /// The kernel has no network.
    pub fn open() -> io::Result<Self> {
        let kind = SockProtocol::NetlinkRoute;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, kind)?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(5))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Sends one request and waits for its answer.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn request(&mut self, message: &Message) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        send(self.socket.as_raw_fd(), &message.encode(self.sequence), MsgFlags::empty())?;
        let mut buffer = [0; 8192];
        loop {
            let length = recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            if let Some(result) = answer(buffer.get(..length).unwrap_or(&[]), self.sequence) {
                return result;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn messages_have_the_layout_of_the_kernel_headers() {
        // Written by hand from the structures in the headers, for a little-endian machine.
        let up = Message::up(2, Some(1400)).encode(7);
        assert_eq!(
            up,
            [
                40, 0, 0, 0, 16, 0, 5, 0, 7, 0, 0, 0, 0, 0, 0, 0, // header
                0, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, // ifinfomsg
                8, 0, 4, 0, 0x78, 5, 0, 0, // IFLA_MTU
            ]
        );
        let address = Message::address(2, "10.0.0.5".parse().unwrap(), 24).encode(1);
        assert_eq!(
            address,
            [
                40, 0, 0, 0, 20, 0, 5, 5, 1, 0, 0, 0, 0, 0, 0, 0, // header
                2, 24, 2, 0, 2, 0, 0, 0, // ifaddrmsg
                8, 0, 2, 0, 10, 0, 0, 5, 8, 0, 1, 0, 10, 0, 0, 5, // IFA_LOCAL, IFA_ADDRESS
            ]
        );
        let route = Message::default_route(2, "fe80::1".parse().unwrap(), true).encode(1);
        assert_eq!(&route[..4], [56, 0, 0, 0]);
        assert_eq!(&route[16..28], [10, 0, 0, 0, 254, 4, 0, 1, 4, 0, 0, 0]);
        assert_eq!(&route[28..36], [8, 0, 4, 0, 2, 0, 0, 0]);
        assert_eq!(&route[36..42], [20, 0, 5, 0, 0xfe, 0x80]);
    }

    #[test]
    fn the_kernel_answers_a_request_for_an_interface_that_does_not_exist() {
        let mut netlink = Netlink::open().unwrap();
        let error = netlink.request(&Message::up(i32::MAX, None)).unwrap_err();
        // An ordinary user is told that first.
        let expected = if nix::unistd::geteuid().is_root() { libc::ENODEV } else { libc::EPERM };
        assert_eq!(error.raw_os_error(), Some(expected));
    }

    proptest! {
        #[test]
        fn arbitrary_answers_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100), sequence: u32) {
            let _any = answer(&bytes, sequence);
        }
    }
}
