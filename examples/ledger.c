#include <unistd.h>

struct account { int transfers; int balance; };

static void transfer(struct account *account, int amount)
{
    account->transfers++;
    account->balance -= amount;
    sleep(1);
}

int main(void)
{
    struct account account = { 0, 500 };
    for (int amount = 100; amount < 200; amount += 10) transfer(&account, amount);
}
