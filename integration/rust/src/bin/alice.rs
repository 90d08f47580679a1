use ockam::identity::{Identifier, SecureChannelOptions, TrustIdentifierPolicy};
use ockam::tcp::{TcpConnectionOptions, TcpTransportExtension};
use ockam::{node, route, Context, Result};
use std::time::Duration;

#[ockam::node]
async fn main(ctx: Context) -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let [_, hub, forwarder, bob] = args.as_slice() else {
        panic!("alice HUB FORWARDING-ADDRESS IDENTIFIER");
    };
    let mut node = node(ctx).await?;
    let tcp = node.create_tcp_transport()?;
    let alice = node.create_identity().await?;

    let connection = tcp
        .connect(hub.clone(), TcpConnectionOptions::new())
        .await?;
    let options = SecureChannelOptions::new()
        .with_trust_policy(TrustIdentifierPolicy::new(Identifier::try_from(
            bob.as_str(),
        )?))
        .with_timeout(Duration::from_secs(10));
    let channel = node
        .create_secure_channel(
            &alice,
            route![connection, forwarder.as_str(), "listener"],
            options,
        )
        .await?;

    // `sealmq listen` prints what arrives at app, and sends back what arrives at echoer.
    let hello = "Hello Ockam!".to_string();
    node.send(route![channel.clone(), "app"], hello.clone())
        .await?;
    let answer: String = node
        .send_and_receive(route![channel, "echoer"], hello)
        .await?;
    println!("{answer}");
    node.shutdown().await
}
