use ockam::identity::{SecureChannelListenerOptions, TrustEveryonePolicy};
use ockam::remote::RemoteRelayOptions;
use ockam::tcp::{TcpConnectionOptions, TcpTransportExtension};
use ockam::{node, Context, Result};

#[ockam::node]
async fn main(ctx: Context) -> Result<()> {
    let hub = std::env::args().nth(1).expect("HOST:PORT of the hub");
    let mut node = node(ctx).await?;
    let tcp = node.create_tcp_transport()?;
    let bob = node.create_identity().await?;

    // Say what the hub may reach before connecting: the listener, and nothing else.
    let connection = TcpConnectionOptions::new();
    let listener = SecureChannelListenerOptions::new()
        .as_consumer(&connection.flow_control_id())
        .with_trust_policy(TrustEveryonePolicy);
    // And what peers with a channel may reach: here the program itself.
    let peers = listener.spawner_flow_control_id();
    node.flow_controls().add_consumer(&"app".into(), &peers);
    node.create_secure_channel_listener(&bob, "listener", listener)?;

    let connection = tcp.connect(hub, connection).await?;
    let relay = node
        .create_relay(connection, RemoteRelayOptions::new())
        .await?;
    println!("Forwarding address: {}", relay.remote_address());

    let message = node.receive::<String>().await?;
    println!("{}", message.into_body()?);
    node.shutdown().await
}
