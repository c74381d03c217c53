// Threads that move money between accounts, make garbage, and catch null pointer exceptions.
import java.util.Random;

public class Bank {
    static final class Account { long balance; Account next; Account(long balance) { this.balance = balance; } }
    static final Account[] accounts = new Account[1000];
    static final Object lock = new Object();
    static volatile long caught;

    static void work(int seed) {
        Random draw = new Random(seed);
        Object[] garbage = new Object[512];
        for (;;) {
            synchronized (lock) {
                for (int i = 0; i < 100; i++) {
                    int a = draw.nextInt(1000), b = draw.nextInt(1000);
                    accounts[a] = new Account(accounts[a].balance - 1);
                    accounts[b] = new Account(accounts[b].balance + 1);
                }
            }
            for (int i = 0; i < 50; i++) garbage[draw.nextInt(512)] = new byte[draw.nextInt(4000)];
            // So often that a capture frequently finds a thread in the middle of one.
            for (int i = 0; i < 20; i++) {
                try { if (accounts[0].next.balance == 1) throw new IllegalStateException(); }
                catch (NullPointerException expected) { caught++; }
            }
        }
    }

    public static void main(String[] arguments) throws Exception {
        for (int i = 0; i < 1000; i++) accounts[i] = new Account(100);
        for (int i = 0; i < 3; i++) {
            int seed = i;
            Thread thread = new Thread(() -> {
                try { work(seed); }
                catch (Throwable other) { System.out.println("WRONG " + other); System.out.flush(); Runtime.getRuntime().halt(3); }
            });
            thread.setDaemon(true);
            thread.start();
        }
        for (long tick = 1;; tick++) {
            Thread.sleep(100);
            long sum = 0;
            synchronized (lock) { for (Account account : accounts) sum += account.balance; }
            if (sum != 100000) { System.out.println("WRONG sum " + sum); Runtime.getRuntime().halt(3); }
            System.out.println("tick " + tick);
        }
    }
}
