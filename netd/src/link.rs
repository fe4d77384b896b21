//! Interfaces, their addresses and the forwarding entries of bridges, by rtnetlink.
//!
//! Blocking calls over an async library: one runtime of one thread, which only turns while a call waits.

use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use blixard_netd_api::Subnet;
use blixard_vmm_api::config::MacAddr;
use futures::{StreamExt, TryStreamExt};
use nix::libc::{EAFNOSUPPORT, ENODEV};
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use rtnetlink::packet_route::link::{
    AfSpecInet6, AfSpecUnspec, BridgeStpState, In6AddrGenMode, InfoKind, LinkAttribute, LinkExtentMask,
    LinkInfo, LinkMessage,
};
use rtnetlink::packet_route::neighbour::{NeighbourFlags, NeighbourState};
use rtnetlink::{Handle, LinkBridge, LinkBridgePort, LinkUnspec};
use tokio::runtime::Runtime;

/// Longest time the kernel may take to answer. It answers at once; this ends the wait for an answer that was lost.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(5);

/// Bit of 01:80:c2:00:00:0e. Frames for it that are not to be forwarded reach the host's IP past every hook of the packet
/// filter, whatever they contain (br_handle_frame in net/bridge/br_input.c).
const LLDP_GROUP: u16 = 1 << 0xe;

/// Why an interface could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// No connection to the kernel.
    #[error("cannot open a netlink connection")]
    Connect(#[source] io::Error),
    /// The kernel refused.
    #[error("cannot {operation}")]
    Refused {
        /// What was tried, on which interface.
        operation: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// No answer, or none that makes sense.
    #[error("no usable answer from the kernel to: {operation}")]
    NoAnswer {
        /// What was tried, on which interface.
        operation: String,
    },
}

/// What an interface is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkKind {
    /// A bridge.
    Bridge,
    /// A TUN or TAP.
    Tun,
    /// Anything else.
    Other,
}

/// An interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its number.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// What it is.
    pub kind: LinkKind,
    /// Number of the bridge (or similar) it is attached to.
    pub controller: Option<u32>,
    /// Largest packet in bytes.
    pub mtu: u32,
    /// Hardware address.
    pub mac: Option<MacAddr>,
}

/// An address of an interface.
#[derive(Debug, Clone)]
pub struct Address {
    /// Number of the interface.
    pub index: u32,
    /// The address and the length of its prefix.
    pub subnet: Subnet,
    message: AddressMessage,
}

/// A connection to the kernel.
pub struct Links {
    runtime: Runtime,
    handle: Handle,
}

impl Links {
    /// Connects, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// [`LinkError::Connect`].
    pub fn connect() -> Result<Self, LinkError> {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(LinkError::Connect)?;
        let entered = runtime.enter();
        let (connection, handle, _) = rtnetlink::new_connection().map_err(LinkError::Connect)?;
        drop(entered);
        runtime.spawn(connection);
        Ok(Self { runtime, handle })
    }

    /// All interfaces.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn list(&self) -> Result<Vec<Link>, LinkError> {
        let mask = vec![LinkExtentMask::SkipStats];
        let found = self.handle.link().get().set_filter_mask(AddressFamily::Unspec, mask).execute();
        let messages: Vec<LinkMessage> = self.wait(found.try_collect(), || "list the interfaces".into())?;
        Ok(messages.iter().filter_map(read_link).collect())
    }

    /// All addresses of all interfaces.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn addresses(&self) -> Result<Vec<Address>, LinkError> {
        let found = self.handle.address().get().execute();
        let messages: Vec<AddressMessage> = self.wait(found.try_collect(), || "list the addresses".into())?;
        Ok(messages.into_iter().filter_map(read_address).collect())
    }

    /// Makes a bridge, not yet up, and answers its number.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn add_bridge(&self, name: &str) -> Result<u32, LinkError> {
        let message = LinkUnspec::new_with_name(name).build();
        let mut kind = LinkMessage::default();
        kind.attributes = message.attributes;
        kind.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge)]));
        self.wait(self.handle.link().add(kind).execute(), || format!("make the bridge {name}"))?;
        Ok(self.get(name)?.index)
    }

    /// Gives a bridge its properties: no spanning tree, no delay, no snooping, its largest packet in bytes, and that
    /// frames for the LLDP group are treated as any other.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn set_bridge(&self, index: u32, name: &str, mtu: u16) -> Result<(), LinkError> {
        // By number only: up to Linux 6.1 a name in the message counts as a renaming, which a bridge that is up refuses.
        let message = rtnetlink::LinkMessageBuilder::<LinkBridge>::new_with_info_kind(InfoKind::Bridge)
            .index(index)
            .stp_state(BridgeStpState::Disabled)
            .forward_delay(0)
            .mcast_snooping(false)
            .group_fwd_mask(LLDP_GROUP)
            .mtu(mtu.into())
            .build();
        self.wait(self.handle.link().change(message).execute(), || format!("set up the bridge {name}"))
    }

    /// Gives an interface a hardware address. Even the same one again empties the host's table of its neighbours.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn set_mac(&self, index: u32, name: &str, mac: MacAddr) -> Result<(), LinkError> {
        let message = LinkUnspec::new_with_index(index).address(mac.0.to_vec()).build();
        self.wait(self.handle.link().change(message).execute(), || {
            format!("give {name} its hardware address")
        })
    }

    /// Switches an interface on.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn up(&self, index: u32, name: &str) -> Result<(), LinkError> {
        let message = LinkUnspec::new_with_index(index).up().build();
        self.wait(self.handle.link().change(message).execute(), || format!("switch {name} on"))
    }

    /// Sets the largest packet of an interface, in bytes.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn set_mtu(&self, index: u32, name: &str, mtu: u32) -> Result<(), LinkError> {
        let message = LinkUnspec::new_with_index(index).mtu(mtu).build();
        self.wait(self.handle.link().change(message).execute(), || format!("set the mtu of {name}"))
    }

    /// Keeps the host from making a link-local address for an interface: what comes in there is the bridge's business.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn forbid_own_address(&self, index: u32, name: &str) -> Result<(), LinkError> {
        let none = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
        let message = LinkUnspec::new_with_index(index)
            .append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![none]))
            .build();
        let request = self.handle.link().change(message).execute();
        match self.wait(request, || format!("keep {name} without an address")) {
            // A host without IPv6 makes none.
            Err(LinkError::Refused { source, .. }) if source.raw_os_error() == Some(EAFNOSUPPORT) => Ok(()),
            result => result,
        }
    }

    /// Attaches an interface to a bridge as a port that learns no addresses and gets no frames for unknown ones.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn attach(&self, port: u32, bridge: u32, name: &str) -> Result<(), LinkError> {
        let message = LinkUnspec::new_with_index(port).controller(bridge).build();
        let what = || format!("attach {name} to its bridge");
        self.wait(self.handle.link().change(message).execute(), what)?;
        let message = LinkBridgePort::new(port).learning(false).flood(false).hairpin(false).build();
        self.wait(self.handle.link().set_port(message).execute(), what)
    }

    /// Tells the bridge of `port` that a hardware address is behind it.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn add_forwarding(&self, port: u32, name: &str, mac: MacAddr) -> Result<(), LinkError> {
        let request = self
            .handle
            .neighbours()
            .add_bridge(port, &mac.0)
            .state(NeighbourState::Noarp)
            .flags(NeighbourFlags::Controller)
            .replace();
        self.wait(request.execute(), || format!("add a forwarding entry for {name}"))
    }

    /// Takes back [`Self::add_forwarding`]; no error when there is no such entry.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn remove_forwarding(&self, port: u32, name: &str, mac: MacAddr) -> Result<(), LinkError> {
        let mut request = self.handle.neighbours().add_bridge(port, &mac.0).flags(NeighbourFlags::Controller);
        let message = request.message_mut().clone();
        let request = self.handle.neighbours().del(message).execute();
        match self.wait(request, || format!("remove a forwarding entry of {name}")) {
            Err(LinkError::Refused { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }

    /// Adds an address without looking for duplicates: it must be usable at once.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn add_address(&self, index: u32, name: &str, subnet: Subnet) -> Result<(), LinkError> {
        let mut request = self.handle.address().add(index, subnet.gateway, subnet.prefix).replace();
        if subnet.gateway.is_ipv6() {
            request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
        }
        self.wait(request.execute(), || format!("give {name} the address {subnet}"))
    }

    /// Removes an address.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn remove_address(&self, address: &Address, name: &str) -> Result<(), LinkError> {
        let request = self.handle.address().del(address.message.clone()).execute();
        self.wait(request, || format!("take the address {} from {name}", address.subnet))
    }

    /// Removes an interface; no error when it is gone already.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn remove(&self, index: u32, name: &str) -> Result<(), LinkError> {
        match self.wait(self.handle.link().del(index).execute(), || format!("remove {name}")) {
            Err(LinkError::Refused { source, .. }) if is_absent(&source) => Ok(()),
            result => result,
        }
    }

    /// The interface of this name, if there is one.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn find(&self, name: &str) -> Result<Option<Link>, LinkError> {
        let mut found = Box::pin(self.handle.link().get().match_name(name).execute());
        match self.wait(async { found.next().await.transpose() }, || format!("find {name}")) {
            Ok(message) => Ok(message.as_ref().and_then(read_link)),
            Err(LinkError::Refused { source, .. }) if is_absent(&source) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The interface of this name, which must exist.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn get(&self, name: &str) -> Result<Link, LinkError> {
        self.find(name)?.ok_or_else(|| LinkError::NoAnswer { operation: format!("find {name}") })
    }

    fn wait<T>(
        &self,
        work: impl Future<Output = Result<T, rtnetlink::Error>>,
        operation: impl Fn() -> String,
    ) -> Result<T, LinkError> {
        let limited = async { tokio::time::timeout(ANSWER_TIME_MAX, work).await };
        match self.runtime.block_on(limited) {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(rtnetlink::Error::NetlinkError(answer))) => {
                Err(LinkError::Refused { operation: operation(), source: answer.to_io() })
            }
            Ok(Err(_)) | Err(_) => Err(LinkError::NoAnswer { operation: operation() }),
        }
    }
}

fn is_absent(error: &io::Error) -> bool {
    error.raw_os_error() == Some(ENODEV)
}

fn read_link(message: &LinkMessage) -> Option<Link> {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        kind: LinkKind::Other,
        controller: None,
        mtu: 0,
        mac: None,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Controller(index) => link.controller = Some(*index),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Address(bytes) => link.mac = bytes.as_slice().try_into().ok().map(MacAddr),
            LinkAttribute::LinkInfo(infos) => {
                link.kind = infos.iter().find_map(read_kind).unwrap_or(LinkKind::Other);
            }
            _ => {}
        }
    }
    (!link.name.is_empty()).then_some(link)
}

fn read_kind(info: &LinkInfo) -> Option<LinkKind> {
    match info {
        LinkInfo::Kind(InfoKind::Bridge) => Some(LinkKind::Bridge),
        LinkInfo::Kind(InfoKind::Tun) => Some(LinkKind::Tun),
        LinkInfo::Kind(_) => Some(LinkKind::Other),
        _ => None,
    }
}

fn read_address(message: AddressMessage) -> Option<Address> {
    let mut found: Option<IpAddr> = None;
    for attribute in &message.attributes {
        match attribute {
            // On a point-to-point interface IFA_ADDRESS is the other end.
            AddressAttribute::Local(address) => found = Some(*address),
            AddressAttribute::Address(address) => found = found.or(Some(*address)),
            _ => {}
        }
    }
    let subnet = Subnet { gateway: found?, prefix: message.header.prefix_len };
    Some(Address { index: message.header.index, subnet, message })
}
